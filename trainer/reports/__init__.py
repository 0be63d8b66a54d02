"""Pages to look at, without scripts: `write_report` (a run), `write_preview` (samples)."""

from plait.trainer.reports.pages import thumbnail
from plait.trainer.reports.preview import PreviewSample, PreviewToken, write_preview
from plait.trainer.reports.report import write_report

__all__ = ["PreviewSample", "PreviewToken", "thumbnail", "write_preview", "write_report"]
