"""The token stream: the types every room shares, and the one way from a sample to positions.

    Sample ──render──> Document ──pack──> TokenStream

A `Document` is planned from headers alone: it knows how many positions each picture takes, not
its pixels. `pack` joins documents, and the loaded inputs of their items, into one row.
"""

from plait.stream.layout import Fill, Layout
from plait.stream.packing import check_placeholders, pack
from plait.stream.rendering import Tokenize, render, write_media
from plait.stream.samples import Message, Sample
from plait.stream.types import (
    Document,
    Encoded,
    IntArray,
    Item,
    ItemInputs,
    ItemPlan,
    MediaBatch,
    Span,
    TokenStream,
)

__all__ = [
    "Document",
    "Encoded",
    "Fill",
    "IntArray",
    "Item",
    "ItemInputs",
    "ItemPlan",
    "Layout",
    "MediaBatch",
    "Message",
    "Sample",
    "Span",
    "TokenStream",
    "Tokenize",
    "check_placeholders",
    "pack",
    "render",
    "write_media",
]
