"""Where everything lies that is fetched, converted or kept by default."""

import os
from pathlib import Path


def home() -> Path:
    """`$PLAIT_HOME`, `~/.cache/plait` by default."""
    named = os.environ.get("PLAIT_HOME")
    return Path(named).expanduser().absolute() if named else Path.home() / ".cache" / "plait"
