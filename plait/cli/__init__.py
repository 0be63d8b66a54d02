"""The command line: `plait fetch|train|report|sample|preview|plan|info`.

Each command parses its words and calls one function of a room; a module per group of commands.
"""

from plait.cli.main import main

__all__ = ["main"]
