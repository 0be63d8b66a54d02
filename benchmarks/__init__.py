"""Measurements, each a program: `python -m benchmarks.<name> --json` from the checkout's root.

`import plait` takes that root off `sys.path`, so a benchmark imports nothing else from it.
"""
