"""A sequence ends at the first token that completes a stop text, or is a stop token."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from plait.trainer.backbone import Backbone
from plait.trainer.build import load_language
from plait.trainer.sampling.stopping import Stops


@pytest.fixture(scope="module")
def tokenizer(tiny_language: Path) -> Any:
    """Of bytes and a few words: a character may take up to four tokens."""
    return PreTrainedTokenizerFast.from_pretrained(tiny_language)


def end(stops: Stops, tokens: list[int]) -> int | None:
    """How many of these tokens a sequence has when it ends; None where it does not."""
    return next((n for n in range(1, len(tokens) + 1) if stops.reached(tokens[:n])), None)


def first_with(tokenizer: Any, tokens: list[int], stop: str) -> int | None:
    """The same by reading all of a sequence at each of its tokens."""
    texts = [tokenizer.decode(tokens[:n], clean_up_tokenization_spaces=False)
             for n in range(len(tokens) + 1)]  # fmt: skip
    return next((n for n, text in enumerate(texts) if stop in text), None)


def test_a_model_may_have_more_ends_than_its_tokenizer_knows(tokenizer: Any) -> None:
    """Of several end tokens a tokenizer names one; those of `generation_config.json` count too."""
    assert Stops(tokenizer, None, (7, 9)).tokens == {tokenizer.eos_token_id, 7, 9}
    assert Stops(tokenizer, (), (7, 9)).tokens == set()
    assert Stops(tokenizer, (5,), (7, 9)).tokens == {5}


def test_ends_are_those_that_the_model_s_files_name(tiny_language: Path, tmp_path: Path) -> None:
    folder = tmp_path / "two-ends"
    shutil.copytree(tiny_language, folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    assert Backbone(load_language(folder, "float32")).end_tokens == ()
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 3]}')
    assert Backbone(load_language(folder, "float32")).end_tokens == (2, 3)


TEXT = "a red disc — naïve 日本語 🙂🙃 the big square ! " * 2


@pytest.mark.parametrize(
    "stop",
    [
        "a",
        "red",
        "d disc",
        "—",
        "ï",
        "ve 日",
        "日",
        "本語",
        "🙂",
        "🙃",
        "🙂🙃 t",
        " !",
        "e 日本語 🙂🙃 the b",
    ],
)
def test_texts_of_any_bytes_are_found_where_they_end(tokenizer: Any, stop: str) -> None:
    tokens = tokenizer.encode(TEXT, add_special_tokens=False)
    found = end(Stops(tokenizer, (stop,)), tokens)
    assert found is not None and found == first_with(tokenizer, tokens, stop)
    both = end(Stops(tokenizer, ("absent", stop, "square ! a red")), tokens)
    assert both == found


@pytest.mark.parametrize("stop", ["日語", "🙂 🙃", "disc—", "A red", "�x"])
def test_texts_that_never_stand_there_end_nothing(tokenizer: Any, stop: str) -> None:
    tokens = tokenizer.encode(TEXT, add_special_tokens=False)
    assert end(Stops(tokenizer, (stop,)), tokens) is None


def test_a_text_before_the_sequence_is_not_its_own(tokenizer: Any) -> None:
    """A stop text that begins in the prompt is none."""
    tokens = tokenizer.encode("disc", add_special_tokens=False)
    assert end(Stops(tokenizer, ("red disc",)), tokens) is None


def test_stop_tokens_take_the_end_tokens_place_and_texts_come_beside_it(tokenizer: Any) -> None:
    eos = tokenizer.eos_token_id
    tokens = [40, 41, eos, 42, 43]
    for stop, expected in [
        (None, 3),
        ((), None),
        ((42,), 4),
        ((43, 41), 2),
        (("absent",), 3),
        (("absent", 43), 3),
        ((eos,), 3),
    ]:
        assert end(Stops(tokenizer, stop), tokens) == expected, stop


def test_no_end_token_ends_nothing(tokenizer: Any) -> None:
    class Endless:
        eos_token_id = None

        def decode(self, tokens: list[int], **options: Any) -> str:
            text: str = tokenizer.decode(tokens, **options)
            return text

    tokens = [40, 2, 41]
    assert end(Stops(Endless(), None), tokens) is None
    assert end(Stops(Endless(), ("absent",)), tokens) is None


def test_a_token_costs_the_same_however_long_the_sequence_is(tokenizer: Any) -> None:
    class Counting:
        eos_token_id = None
        decoded = 0

        def decode(self, tokens: list[int], **options: Any) -> str:
            self.decoded = max(self.decoded, len(tokens))
            text: str = tokenizer.decode(tokens, **options)
            return text

    counting = Counting()
    stops = Stops(counting, ("日本", "absent"))
    assert not stops.reached(list(range(3, 203)))
    assert counting.decoded <= len("absent") + 8
    plain = Counting()
    assert not Stops(plain, (5,)).reached([4] * 100) and plain.decoded == 0
