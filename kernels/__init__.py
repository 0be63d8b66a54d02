"""One folder per operation: `naive.py` is the truth, the others must equal it."""
