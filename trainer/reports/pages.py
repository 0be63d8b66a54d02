"""What both pages share: the templates, how numbers are written, pictures inside the page."""

import base64
import io
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from numpy.typing import NDArray
from PIL import Image

DASH = "–"


def write_page(template: str, path: Path, values: dict[str, Any]) -> Path:
    """Render a template of this folder to one self-contained file, whole or not at all."""
    environment = Environment(
        loader=PackageLoader("plait.trainer", "reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        percent=percent, number=number, count=count, duration=duration, megabytes=megabytes
    )
    page = environment.get_template(template).render(values)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, part = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(page)
        Path(part).chmod(0o644)
        Path(part).replace(path)
    except BaseException:
        Path(part).unlink(missing_ok=True)
        raise
    return path


def thumbnail(pixels: NDArray[np.uint8], size: int) -> str:
    """A picture (H, W, 3) as a data URI, no side longer than `size` pixels."""
    picture = Image.fromarray(pixels)
    picture.thumbnail((size, size), Image.Resampling.LANCZOS)
    held = io.BytesIO()
    picture.save(held, "WEBP", quality=85, method=4)
    return "data:image/webp;base64," + base64.b64encode(held.getvalue()).decode("ascii")


def percent(value: float | None) -> str:
    """0.6564 -> 65.6 %."""
    return DASH if value is None else f"{value * 100:.1f} %"


def number(value: float | None, digits: int = 3) -> str:
    """2.40312 -> 2.403."""
    return DASH if value is None else f"{value:.{digits}f}"


def count(value: float | None) -> str:
    """134515008 -> 134,515,008."""
    return DASH if value is None else f"{value:,.0f}"


def duration(seconds: float | None) -> str:
    """376.2 -> 6 min 16 s."""
    if seconds is None:
        return DASH
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def megabytes(value: float | None) -> str:
    """2100 -> 2.10 GB."""
    if value is None:
        return DASH
    return f"{value / 1000:.2f} GB" if value >= 1000 else f"{value:.0f} MB"
