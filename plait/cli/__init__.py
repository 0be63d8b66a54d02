"""The command line: `plait fetch|info|lint|convert|train|report|plan|preview|sample`.

Each command parses its words and calls one function of a room; a module per group of commands.
"""

from plait.cli.main import main

__all__ = ["main"]
