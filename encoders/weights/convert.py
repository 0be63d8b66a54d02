"""The process that converts weights: `python -m …weights.convert MODULE SOURCE TARGET`.

A process of its own returns all its memory when it ends, and can be killed without harm. It writes
how far it is, `DONE/TOTAL`, a line at a time.
"""

import importlib
import sys
from pathlib import Path


def main() -> None:
    """Convert what lies in SOURCE into the empty folder TARGET."""
    module, source, target = sys.argv[1:]
    converter = importlib.import_module(module)
    converter.convert(Path(source), Path(target), lambda done, total: print(f"{done}/{total}"))


if __name__ == "__main__":
    main()
