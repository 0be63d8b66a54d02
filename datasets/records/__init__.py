"""Rows on disk, read lazily as samples.

    open_records("stamps/", captions=CaptionOptions(lower_first=True))  # media with .txt files
    open_records("pairs/captions.csv")                                  # a file and a text a row
    open_records("chats.jsonl")                                         # messages and images

A row is read when it is asked for, and a broken one raises `DataError` then: whoever reads decides
whether to skip it. `tables` says how files become rows, `dialects` what a row's keys mean.
"""

from plait.datasets.records.base import LeftOut, Records
from plait.datasets.records.captions import CaptionOptions
from plait.datasets.records.opening import DIALECTS, open_records
from plait.datasets.records.tables import TABLES

__all__ = ["DIALECTS", "TABLES", "CaptionOptions", "LeftOut", "Records", "open_records"]
