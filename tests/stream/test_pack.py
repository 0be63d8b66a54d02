"""Joining documents into a row, and guarantee 1: placeholders equal features."""

import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from plait.errors import DataError, ModelError, Origin
from plait.modalities import Image
from plait.stream import (
    Document,
    Encoded,
    Item,
    ItemInputs,
    ItemPlan,
    Span,
    check_placeholders,
    pack,
)

ORIGIN = Origin("pets", 7, "cat.png")


def document(length: int, spans: tuple[Span, ...] = (), **options: Any) -> Document:
    """Tokens 10, 11, ... with -1 in the spans; one item per number the spans name."""
    ids = np.arange(10, 10 + length)
    sizes: dict[int, int] = {}
    for span in spans:
        ids[span.start : span.stop] = -1
        sizes[span.item] = sizes.get(span.item, 0) + span.length
    part = Image(np.zeros((4, 4), dtype=np.uint8))
    encoders = {span.item: span.encoder for span in spans}
    items = tuple(
        Item(part, ItemPlan(encoders[number], size, (1, 1, size)), origin=ORIGIN)
        for number, size in sorted(sizes.items())
    )
    return Document(
        token_ids=ids,
        targets=ids + 1,
        weights=np.linspace(0, 1, length, dtype=np.float32),
        positions=options.pop("positions", np.arange(length)),
        spans=spans,
        items=items,
        origin=ORIGIN,
        **options,
    )


def no_inputs(*documents: Document) -> list[list[ItemInputs]]:
    return [[ItemInputs() for _ in made.items] for made in documents]


def test_documents_stand_one_after_another() -> None:
    a = document(4, run="r", sample_id="s", group=3)
    b = document(3, (Span(0, 2, "e", 0, group=0),))
    stream = pack([a, b], no_inputs(a, b))
    assert stream.bounds == [(0, 4), (4, 7)] and stream.length == 7
    assert stream.token_ids.tolist() == [10, 11, 12, 13, -1, -1, 12]
    assert stream.targets[:4].tolist() == [11, 12, 13, 14]
    assert stream.positions.tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert stream.visible.tolist() == [[0, 0, 0, 0, 4, 4, 4], [1, 2, 3, 4, 6, 6, 7]]
    assert (stream.run, stream.sample_id, stream.group) == (["r", ""], ["s", ""], [3, None])
    assert stream.origins == [ORIGIN, ORIGIN]
    assert stream.is_media.tolist() == [False] * 4 + [True, True, False]


def test_positions_of_three_ranks_join_along_the_row() -> None:
    a = document(2, positions=np.zeros((3, 2), dtype=np.int64))
    b = document(3, positions=np.ones((3, 3), dtype=np.int64))
    assert pack([a, b], [[], []]).positions.shape == (3, 5)
    with pytest.raises(ModelError, match="positions of one rank"):
        pack([a, document(2)], [[], []])


def test_every_position_takes_its_own_feature() -> None:
    """Two documents, two items, one of them in two spans that stand in reversed order."""
    a = document(8, (Span(1, 2, "e", 0, offset=1), Span(5, 1, "e", 0, offset=0)))
    b = document(4, (Span(0, 2, "e", 0), Span(2, 1, "other", 1)))
    batch = pack([a, b], no_inputs(a, b)).media
    assert batch["e"].index.tolist() == [1, 2, 5, 8, 9]
    assert batch["e"].sources.tolist() == [1, 2, 0, 3, 4]
    assert len(batch["e"].items) == 2 and batch["e"].origins == [ORIGIN, ORIGIN]
    assert batch["other"].index.tolist() == [10] and batch["other"].sources.tolist() == [0]


def test_what_does_not_fit_together_is_refused() -> None:
    a, b = document(3), document(2)
    with pytest.raises(ModelError, match="at least one document"):
        pack([], [])
    with pytest.raises(ModelError, match=r"2 documents.*1"):
        pack([a, b], [[]])
    values = {"advantages": np.ones(2, dtype=np.float32)}
    with pytest.raises(ModelError, match="advantages"):
        pack([a, replace(b, loss_inputs=values)], [[], []])
    named = [replace(b, loss_inputs=values)] * 2
    assert pack(named, [[], []]).loss_inputs["advantages"].tolist() == [1, 1, 1, 1]


def test_good_documents_pass_the_check() -> None:
    check_placeholders(document(3), -1)
    check_placeholders(document(8, (Span(1, 2, "e", 0), Span(4, 3, "e", 0, offset=2))), -1)


def broken_documents() -> dict[str, Document]:
    good = document(8, (Span(2, 3, "e", 0),))
    extra, missing = good.token_ids.copy(), good.token_ids.copy()
    extra[6] = -1
    missing[3] = 5
    longer = replace(good.items[0], plan=ItemPlan("e", 4, (1, 1, 4)))
    return {
        "a placeholder too many": replace(good, token_ids=extra),
        "a placeholder too few": replace(good, token_ids=missing),
        "a span elsewhere": replace(good, spans=(Span(3, 3, "e", 0),)),
        "a span twice": replace(good, spans=(*good.spans, *good.spans)),
        "spans that overlap": replace(good, spans=(Span(2, 2, "e", 0), Span(3, 2, "e", 0, 1))),
        "an item that is not there": replace(good, spans=(replace(good.spans[0], item=1),)),
        "another encoder": replace(good, spans=(replace(good.spans[0], encoder="other"),)),
        "a feature twice": replace(good, spans=(Span(2, 2, "e", 0), Span(4, 1, "e", 0, offset=1))),
        "a feature by none": replace(good, spans=(Span(2, 2, "e", 0), Span(4, 1, "e", 0, 3))),
        "features from elsewhere": replace(good, spans=(replace(good.spans[0], offset=5),)),
        "a promise not kept": replace(good, items=(longer,)),
        "an item without positions": replace(good, items=(*good.items, good.items[0])),
    }


@pytest.mark.parametrize("name", broken_documents())
def test_placeholders_must_equal_features(name: str) -> None:
    where = r"placeholders must equal features.*\(dataset pets, row 7, file cat.png\)"
    with pytest.raises(DataError, match=where) as caught:
        check_placeholders(broken_documents()[name], -1)
    again = pickle.loads(pickle.dumps(caught.value))
    assert type(again) is DataError and str(again) == str(caught.value)


def test_features_that_are_too_few_name_their_row() -> None:
    made = document(8, (Span(1, 2, "e", 0), Span(4, 3, "e", 1)))
    second = Origin("pets", 7, "dog.png")
    made = replace(made, items=(made.items[0], replace(made.items[1], origin=second)))
    batch = pack([made], no_inputs(made)).media["e"]
    right = [Encoded(torch.zeros(2, 4)), Encoded(torch.zeros(3, 4))]
    batch.check(right)
    where = r"3 positions were planned.*'e'.*returned 4.*\(dataset pets, row 7, file dog.png\)"
    with pytest.raises(DataError, match=where):
        batch.check([right[0], Encoded(torch.zeros(4, 4))])
    deep = [replace(item, layers=(item.embeddings, item.embeddings)) for item in right]
    batch.check(deep)
    short = replace(right[1], layers=(torch.zeros(3, 4), torch.zeros(2, 4)))
    where = r"3 positions were planned.*layer 1 of its features has 2.*file dog.png\)"
    with pytest.raises(DataError, match=where):
        batch.check([deep[0], short])
    with pytest.raises(ModelError, match=r"'e'.*2 items.*returned 1"):
        batch.check(right[:1])


def test_an_item_is_known_by_its_numbers_whatever_their_strides() -> None:
    """A single number of a larger tensor keeps its stride, which torch takes for contiguous."""
    table = torch.arange(6, dtype=torch.float64).reshape(3, 2)
    for part in (table[:1, 0], table[:, 1], table.T, table[:0]):
        given = ItemInputs({"seconds": part}).digest()
        assert given == ItemInputs({"seconds": part.clone().contiguous()}).digest()
    assert ItemInputs({"a": table[:1, 0]}).digest() != ItemInputs({"a": table[1:2, 0]}).digest()
