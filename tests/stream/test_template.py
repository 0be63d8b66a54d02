"""What a chat template may leave out or rewrite: nothing that a row says vanishes in silence."""

import pickle
from typing import Any

import pytest

from plait.errors import Origin, RenderError
from plait.modalities import Text
from plait.stream import Document, Message, Sample, render

ORIGIN = Origin("pets", 7, "cat.png")

HEADER = "{{ '<|im_start|>' + m['role'] + '\n' }}"
CLOSED = HEADER + "{{ m['content'] + '<|im_end|>\n' }}"
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
NO_SYSTEM = (
    "{% for m in messages %}{% if m['role'] != 'system' %}" + CLOSED + "{% endif %}{% endfor %}"
) + PROMPT
TWICE = "{{ messages[0]['content'] }}{% for m in messages %}" + CLOSED + "{% endfor %}" + PROMPT
# The marks enclose the header; thoughts before the last question are left out, as Qwen3 does it.
ENCLOSING = (
    "{% set question = namespace(at=0) %}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{% set question.at = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}" + HEADER + "{% if "
    "loop.index0 < question.at %}{{ m['content'].split('</think>')[-1] }}{% else %}"
    "{{ m['content'] }}{% endif %}{{ '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}"
) + (CLOSED + "{% endif %}{% endfor %}" + PROMPT)
STRIPPING = ENCLOSING.replace("{% generation %}" + HEADER, HEADER + "{% generation %}")
UNMARKED = STRIPPING.replace("{% generation %}", "").replace("{% endgeneration %}", "")


def say(role: str, *parts: Any, weight: float = 1.0) -> Message:
    made = tuple(Text(part) if isinstance(part, str) else part for part in parts)
    return Message(role, made, weight)


def learned(tokenizer: Any, document: Document) -> str:
    text: str = tokenizer.decode(document.targets[document.weights != 0])
    return text


@pytest.mark.parametrize("for_generation", [False, True])
def test_a_picture_that_a_template_drops_is_refused(
    tokenizer: Any, grids: Any, make_picture: Any, for_generation: bool
) -> None:
    """Content is shortened: the turn is written, the second picture in it is not."""
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'].split(' | ')[0] + '<|im_end|>' }}{% endfor %}"
    )
    turn = say("user", make_picture(1, 1), " | ", make_picture(2, 2), "what ?")
    sample = Sample((say("system", "a"), turn, say("assistant", "red")), origin=ORIGIN)
    rule = r"does not write image 2 of 2, in turn 1 \('user'\).*pets, row 7"
    with pytest.raises(RenderError, match=rule) as caught:
        render(sample, tokenizer, grids(), for_generation)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_a_picture_written_twice_or_elsewhere_is_refused(
    tokenizer: Any, grids: Any, make_picture: Any
) -> None:
    one, other = make_picture(1, 1), make_picture(2, 2)
    sample = Sample((say("user", one, " | ", other), say("assistant", "red")))
    body = "{% for m in messages %}{{ m['content']EDIT }}{% endfor %}"
    edits = {
        " + m['content'].split(' | ')[1:] | join": r"writes 2 times image 2 of 2, in turn 0",
        ".split(' | ') | reverse | join": r"writes in another place image 1 of 2",
    }
    for edit, rule in edits.items():
        tokenizer.chat_template = body.replace("EDIT", edit)
        with pytest.raises(RenderError, match=rule):
            render(sample, tokenizer, grids())


@pytest.mark.parametrize(
    ("template", "rule"),
    [
        (NO_SYSTEM, r"does not write turn 0 \('system'\).*pets, row 7"),
        (TWICE, r"writes 2 times turn 0 \('system'\)"),
    ],
)
def test_a_turn_that_a_template_drops_or_doubles_is_refused(
    tokenizer: Any, grids: Any, template: str, rule: str
) -> None:
    tokenizer.chat_template = template
    turns = (say("user", "what ?"), say("assistant", "red"))
    sample = Sample((say("system", "big"), *turns), origin=ORIGIN)
    for for_generation in (False, True):
        with pytest.raises(RenderError, match=rule):
            render(sample, tokenizer, grids(), for_generation)
    if template is NO_SYSTEM:
        assert learned(tokenizer, render(Sample(turns), tokenizer, grids())) == "red<|im_end|>"


def test_messages_and_bare_parts_together_are_refused(tokenizer: Any, grids: Any) -> None:
    sample = Sample((say("user", "a"), say("assistant", "red")), (Text("lost"),), origin=ORIGIN)
    with pytest.raises(RenderError, match=r"messages or bare parts.*pets, row 7"):
        render(sample, tokenizer, grids())


THOUGHTS = (
    say("user", "the bar"), say("assistant", "<think>a</think>red disc", weight=0.5),
    say("user", "shape"), say("assistant", "<think>big</think>cross", weight=2),
)  # fmt: skip


@pytest.mark.parametrize("template", [ENCLOSING, STRIPPING])
def test_marks_need_no_prefixes(tokenizer: Any, grids: Any, template: str) -> None:
    """Earlier thoughts are left out; marks that enclose the header learn only what is said."""
    tokenizer.chat_template = template
    row = render(Sample(THOUGHTS), tokenizer, grids())
    assert learned(tokenizer, row) == "red disc<|im_end|><think>big</think>cross<|im_end|>"
    first = len(tokenizer("red disc<|im_end|>", add_special_tokens=False).input_ids)
    weights = row.weights[row.weights != 0]
    assert (weights[:first] == 0.5).all() and (weights[first:] == 2).all()
    prompt = render(Sample(THOUGHTS[:-1]), tokenizer, grids(), for_generation=True)
    answer = tokenizer("<think>big</think>cross<|im_end|>", add_special_tokens=False).input_ids
    made = prompt.token_ids.tolist() + answer
    assert [*row.token_ids.tolist(), 0][: len(made)] == made


def test_marks_that_enclose_the_header_of_a_turn_that_is_rewritten_later(
    tokenizer: Any, grids: Any
) -> None:
    """The answer after the tool was prompted with a thought that a later question removes."""
    tokenizer.chat_template = ENCLOSING
    steps = (THOUGHTS[0], THOUGHTS[1], say("tool", "yellow"), say("assistant", "small bar"))
    row = render(Sample((*steps, *THOUGHTS[2:])), tokenizer, grids())
    said = "red disc<|im_end|>small bar<|im_end|><think>big</think>cross<|im_end|>"
    assert learned(tokenizer, row) == said


def test_marks_that_fit_no_turn_are_refused(tokenizer: Any, grids: Any) -> None:
    """Only the last turn is marked, and a template cannot be believed about the first."""
    tokenizer.chat_template = ENCLOSING.replace(
        "m['role'] == 'assistant'", "m['role'] == 'assistant' and loop.last"
    )
    with pytest.raises(RenderError, match=r"2 such turns and the template marks 1.*pets, row 7"):
        render(Sample(THOUGHTS, origin=ORIGIN), tokenizer, grids())
    assert render(Sample(THOUGHTS[:-1]), tokenizer, grids(), for_generation=True).length


def test_a_turn_that_is_not_learned_may_be_rewritten(tokenizer: Any, grids: Any) -> None:
    tokenizer.chat_template = UNMARKED
    with pytest.raises(RenderError, match=r"cannot be labelled.*turn 1.*weight to 0"):
        render(Sample(THOUGHTS), tokenizer, grids())
    shown = Message("assistant", THOUGHTS[1].parts, weight=0)
    row = render(Sample((THOUGHTS[0], shown, *THOUGHTS[2:])), tokenizer, grids())
    assert learned(tokenizer, row) == "<think>big</think>cross<|im_end|>"
    # A prompt, which gives no turn a weight, is cut into the same tokens.
    prompt = render(Sample(THOUGHTS[:-1]), tokenizer, grids(), for_generation=True)
    assert row.token_ids.tolist()[: prompt.length] == prompt.token_ids.tolist()


@pytest.mark.parametrize("name", ["chatml", "marked", "tiny"])
def test_a_conversation_may_begin_with_an_answer(
    tokenizer: Any, grids: Any, templates: dict[str, str], name: str
) -> None:
    tokenizer.chat_template = templates[name]
    row = render(Sample((say("assistant", " a red disc"),)), tokenizer, grids())
    assert learned(tokenizer, row).endswith("red disc<|im_end|>")


def test_a_template_that_needs_a_first_message_says_so(
    tokenizer: Any, grids: Any, templates: dict[str, str]
) -> None:
    tokenizer.chat_template = templates["system"]
    turns = (say("assistant", "a"), say("user", "big"), say("assistant", "red"))
    with pytest.raises(RenderError, match=r"begin with an assistant turn only.*pets, row 7"):
        render(Sample(turns, origin=ORIGIN), tokenizer, grids())
    shown = Message("assistant", turns[0].parts, weight=0)
    row = render(Sample((shown, *turns[1:])), tokenizer, grids())
    assert learned(tokenizer, row) == "red<|im_end|>"


CALLS = (
    "{% for m in messages %}" + HEADER + "{{ m['content'] }}{% for c in m['tool_calls'] or [] %}"
    "{{ c['function']['name'] }}EDIT{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}" + PROMPT
)


def calling(*calls: dict[str, Any]) -> Sample:
    made = tuple({"type": "function", "function": call} for call in calls)
    turns = (
        say("user", "1 + 1 ?"),
        Message("assistant", (), tool_calls=made),
        say("tool", "2"),
        say("assistant", "2 ."),
    )
    return Sample(turns, origin=ORIGIN)


def test_a_tool_call_is_learned_as_it_is_written(tokenizer: Any, grids: Any) -> None:
    tokenizer.chat_template = CALLS.replace("EDIT", "{{ c['function']['arguments'] | tojson }}")
    document = render(calling({"name": "add", "arguments": {"a": 1}}), tokenizer, grids())
    assert learned(tokenizer, document) == 'add{"a": 1}<|im_end|>2 .<|im_end|>'


@pytest.mark.parametrize(
    ("template", "call"),
    [
        ("{% for m in messages %}" + CLOSED + "{% endfor %}" + PROMPT, 0),  # as SmolLM2 has it
        (CALLS.replace("EDIT", ""), 0),
        (CALLS.replace("EDIT", "{{ c['function']['arguments'] }}{% break %}"), 1),
    ],
)
def test_a_tool_call_that_a_template_drops_is_refused(
    tokenizer: Any, grids: Any, template: str, call: int
) -> None:
    tokenizer.chat_template = template
    sample = calling({"name": "add", "arguments": {"a": 1}}, {"name": "now", "arguments": "soon"})
    with pytest.raises(RenderError, match=rf"not write call {call} of turn 1;.*pets, row 7"):
        render(sample, tokenizer, grids())
