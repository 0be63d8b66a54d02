"""Fixtures shared by every room. Importing plait first takes the checkout's root off sys.path."""

import plait  # noqa: F401, I001  (must come first; see plait/__init__.py)

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
