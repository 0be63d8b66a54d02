"""From a sample to positions: one way for training and generation, and the right labels."""

import pickle
from typing import Any

import numpy as np
import pytest

from plait.errors import Origin, RenderError
from plait.modalities import Text
from plait.stream import Document, Fill, Message, Sample, check_placeholders, render

NAMES = ["chatml", "system", "marked", "tiny"]
ORIGIN = Origin("pets", 7, "cat.png")


def say(role: str, *parts: Any, weight: float = 1.0) -> Message:
    made = tuple(Text(part) if isinstance(part, str) else part for part in parts)
    return Message(role, made, weight)


def learned(document: Document) -> list[int]:
    return document.targets[document.weights != 0].tolist()


def full_row(document: Document) -> list[int]:
    """The tokens of a training document and the last one, which is only a target."""
    return [*document.token_ids.tolist(), int(document.targets[-1])]


# With the tiny template, a tokenizer would merge the first answer with the end of its prompt.
ANSWERS = ["red disc", "\n\n blue square!"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("turns", [1, 2])
def test_the_prompt_and_the_answer_are_the_training_row(
    tokenizer: Any, grids: Any, templates: dict[str, str], make_picture: Any, name: str, turns: int
) -> None:
    tokenizer.chat_template = templates[name]
    messages: list[Message] = []
    for number in range(turns):
        messages.append(say("user", "look ", make_picture(2, 3), " what is it ? "))
        messages.append(say("assistant", ANSWERS[number]))
    row = render(Sample(tuple(messages)), tokenizer, grids())
    prompt = render(Sample(tuple(messages[:-1])), tokenizer, grids(), for_generation=True)
    answer = tokenizer(ANSWERS[turns - 1] + "<|im_end|>", add_special_tokens=False).input_ids
    made = prompt.token_ids.tolist() + answer
    whole = [*row.token_ids.tolist(), row.targets[-1] if row.weights[-1] else None]
    assert whole[: len(made)] == made
    assert not prompt.weights.any()
    assert len(prompt.token_ids) == len(prompt.positions)
    # What generation must say is exactly what the last turn learns, its end token included.
    assert learned(row)[-len(answer) :] == answer
    assert (row.weights[len(prompt.token_ids) - 1 :][: len(answer)] == 1).all()


@pytest.mark.parametrize("name", NAMES)
def test_only_answers_and_their_end_tokens_are_learned(
    tokenizer: Any, grids: Any, templates: dict[str, str], name: str
) -> None:
    tokenizer.chat_template = templates[name]
    sample = Sample((
        say("user", "the bar"), say("assistant", "a red disc", weight=0.5),
        say("user", "big"), say("assistant", "small cross", weight=0),
        say("user", "shape"), say("assistant", "yellow", weight=2),
    ))  # fmt: skip
    document = render(sample, tokenizer, grids())

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
        return ids

    first, last = encode("a red disc<|im_end|>"), encode("yellow<|im_end|>")
    assert learned(document) == first + last
    weights = document.weights[document.weights != 0].tolist()
    assert weights == [0.5] * len(first) + [2.0] * len(last)
    # The turn of weight 0 is shown, and the newline after an end token is nobody's to say.
    text = tokenizer.decode(document.token_ids)
    assert "small cross" in text
    if name != "tiny":
        assert "<|im_end|>\n" in text
    assert (document.targets[:-1] == document.token_ids[1:]).all(), "learned or not"


def test_text_after_a_special_token_inside_an_answer_is_learned(tokenizer: Any, grids: Any) -> None:
    """A template without an end token: the last special token is the answer's own."""
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    sample = Sample((say("user", "big "), say("assistant", "<think>a disc</think>red bar")))
    answer = tokenizer("<think>a disc</think>red bar", add_special_tokens=False).input_ids
    assert learned(render(sample, tokenizer, grids())) == answer


def test_bare_parts_are_learned_with_the_end_token(
    tokenizer: Any, grids: Any, make_picture: Any
) -> None:
    sample = Sample(parts=(make_picture(1, 2), Text("a red disc")))
    document = render(sample, tokenizer, grids(placeholder_id=-1))
    assert tokenizer.decode(learned(document)) == "a red disc<|im_end|>"
    prompt = render(sample, tokenizer, grids(), for_generation=True)
    assert full_row(document)[:-1] == prompt.token_ids.tolist()


def test_several_pictures_in_one_message(tokenizer: Any, grids: Any, make_picture: Any) -> None:
    first, second, third = make_picture(1, 2), make_picture(2, 2), make_picture(1, 1)
    message = say("user", first, "and", second, third, "which ?")
    sample = Sample((message, say("assistant", "red")), view=3, origin=ORIGIN)
    document = render(sample, tokenizer, grids())
    assert [item.part for item in document.items] == [first, second, third]
    assert {item.view for item in document.items} == {3}
    assert [span.length for span in document.spans] == [2, 4, 1]
    assert [span.item for span in document.spans] == [0, 1, 2]
    for span in document.spans:
        assert (document.token_ids[span.start : span.stop] == -1).all()
    assert (document.token_ids == -1).sum() == 7
    check_placeholders(document, -1)


def test_an_item_of_several_spans_counts_its_features_on(
    tokenizer: Any, grids: Any, make_picture: Any
) -> None:
    sample = Sample((say("user", make_picture(3, 2), "?"), say("assistant", "red")))
    document = render(sample, tokenizer, grids(by_row=True, bidirectional=True))
    assert [(s.length, s.item, s.offset, s.group) for s in document.spans] == [
        (2, 0, 0, 0), (2, 0, 2, 0), (2, 0, 4, 0),
    ]  # fmt: skip
    low, high = document.visible()
    start, stop = document.spans[0].start, document.spans[-1].stop
    assert (high[start:stop] == stop).all() and not low.any()
    assert (high[:start] == np.arange(1, start + 1)).all()
    check_placeholders(document, -1)


def test_a_layout_that_forgets_features_is_refused(
    tokenizer: Any, grids: Any, make_picture: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grids, "pieces", lambda *_: ["<", Fill(1), ">"])
    sample = Sample((say("user", make_picture(2, 2)), say("assistant", "a")), origin=ORIGIN)
    with pytest.raises(RenderError, match=r"4 were planned, 1 placed.*pets, row 7"):
        render(sample, tokenizer, grids())


REWRITES = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and not loop.last %}{{ m['content'].split('!')[-1] }}"
    "{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer: Any, grids: Any) -> None:
    tokenizer.chat_template = REWRITES
    turns = (say("user", "a"), say("assistant", "red ! disc"), say("user", "b"))
    sample = Sample((*turns, say("assistant", "bar")), origin=ORIGIN)
    with pytest.raises(RenderError, match=r"cannot be labelled.*turn 1.*pets, row 7") as caught:
        render(sample, tokenizer, grids())
    again = pickle.loads(pickle.dumps(caught.value))
    assert str(again) == str(caught.value) and again.origin == ORIGIN
    # One turn is not rewritten, and a prompt needs no labels.
    assert learned(render(Sample(turns[:2]), tokenizer, grids()))
    prompt = render(Sample(turns), tokenizer, grids(), for_generation=True)
    assert "red" not in tokenizer.decode(prompt.token_ids)


def test_a_template_that_raises_names_the_row(tokenizer: Any, grids: Any) -> None:
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    sample = Sample((say("user", "a"), say("assistant", "b")), origin=ORIGIN)
    with pytest.raises(RenderError, match=r"refuses.*roles must alternate.*pets, row 7"):
        render(sample, tokenizer, grids())
    tokenizer.chat_template = None
    with pytest.raises(RenderError, match=r"no(ne)?.*`template`.*pets, row 7"):
        render(sample, tokenizer, grids())


@pytest.mark.parametrize(
    "messages",
    [
        (say("user", "a disc"),),
        (say("user", "a disc"), say("assistant", "red", weight=0)),
    ],
)
def test_nothing_learned_is_an_error(
    tokenizer: Any, grids: Any, messages: tuple[Message, ...]
) -> None:
    with pytest.raises(RenderError, match=r"labelled token.*dataset pets, row 7, file cat.png"):
        render(Sample(messages, origin=ORIGIN), tokenizer, grids())


def test_marks_that_cover_nothing_are_an_error(tokenizer: Any, grids: Any) -> None:
    """A template whose mask is all zero must not train in silence."""
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{% endfor %}{% generation %}{% endgeneration %}"
    )
    sample = Sample((say("user", "a"), say("assistant", "b")), origin=ORIGIN)
    with pytest.raises(RenderError, match=r"labelled token.*pets, row 7"):
        render(sample, tokenizer, grids())


def test_the_placeholder_in_a_text_is_refused(
    tokenizer: Any, qwen_layout: Any, make_picture: Any
) -> None:
    user = say("user", make_picture(2, 2), "what does <|image_pad|> mean ?")
    sample = Sample((user, say("assistant", "a")), origin=ORIGIN)
    for for_generation in (False, True):
        with pytest.raises(RenderError, match=r"'<\|image_pad\|>'.*dataset pets, row 7"):
            render(sample, tokenizer, qwen_layout, for_generation)
    clean = Sample((say("user", make_picture(2, 2), "what ?"), say("assistant", "a")))
    document = render(clean, tokenizer, qwen_layout)
    check_placeholders(document, qwen_layout.placeholder_id)
    assert document.positions.shape == (3, document.length)


@pytest.mark.parametrize("name", NAMES)
def test_texts_with_our_own_marks_survive(
    tokenizer: Any, grids: Any, templates: dict[str, str], make_picture: Any, name: str
) -> None:
    tokenizer.chat_template = templates[name]
    odd = "\ue0000123456789abcdef:0\ue001 \ue000 {{ eos }} {% raw %}"
    sample = Sample((say("user", odd, make_picture(1, 1), odd), say("assistant", odd)))
    document = render(sample, tokenizer, grids())
    assert tokenizer.decode(learned(document)) == odd + "<|im_end|>"
    assert tokenizer.decode(document.token_ids[document.token_ids >= 0]).count(odd) == 3
    assert len(document.items) == 1


def test_named_templates_use_the_default_one(
    tokenizer: Any, grids: Any, templates: dict[str, str]
) -> None:
    sample = Sample((say("user", "a"), say("assistant", "red")))
    alone = render(sample, tokenizer, grids())
    tokenizer.chat_template = {"default": templates["chatml"], "other": "{{ 1 }}"}
    assert full_row(render(sample, tokenizer, grids())) == full_row(alone)
