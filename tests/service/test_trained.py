"""A run of `plait train`, offered by a server: sampled, asked, and trained on from there."""

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import plait
from plait.errors import ConfigError, PlaitError
from plait.service.catalog import Offer, offer_of_argument, training_spec
from plait.service.errors import ServiceError
from plait.trainer.config import config_from
from plait.trainer.run import train
from plait.trainer.spec import LoraSpec, ModelSpec

GREEDY = plait.SamplingParams(max_tokens=6, temperature=0.0)


@pytest.fixture(scope="module")
def trained(tiny_values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve steps at a high rate, so that it says something else than before."""
    folder = tmp_path_factory.mktemp("trained")
    steps = tiny_values["train"] | {"learning_rate": 0.05}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("PLAIT_HOME", str(folder / "home"))
        train(config_from(tiny_values | {"train": steps}), Console(quiet=True))
    return folder / "run"


@pytest.fixture(scope="module")
def served(new_server: Callable[..., Any], trained: Path) -> Any:
    return new_server(models=[f"named={trained}"]).start()


@pytest.fixture
def remote(served: Any) -> Iterator[Any]:
    with plait.ServiceClient(served.url) as service:
        yield service


@pytest.fixture
def local() -> Iterator[plait.ServiceClient]:
    with plait.ServiceClient() as service:
        yield service


@pytest.fixture(scope="module")
def picture(picture_folder: Path) -> plait.Image:
    return plait.Image(next(picture_folder.rglob("*.png")))


def moved(scores: list[float | None], others: list[float | None]) -> float:
    """How much they differ at most; None, as in pictures, is None in both."""
    assert [one is None for one in scores] == [one is None for one in others]
    pairs = zip(scores, others, strict=True)
    return max(abs(a - b) for a, b in pairs if a is not None and b is not None)


def test_it_says_what_the_run_says(
    served: Any, remote: Any, local: plait.ServiceClient, trained: Path, picture: plait.Image
) -> None:
    """By both clients and by OpenAI's API, and after a kill; another one than its base model."""
    mine = local.create_sampling_client(trained)
    theirs = remote.create_sampling_client(base_model="named")
    right = mine.sample(mine.prompt(picture), 1, GREEDY).result().sequences[0]
    scores = mine.compute_logprobs(mine.prompt(picture, "a red disc")).result()
    untrained = local.create_training_client(offer_of_argument(str(trained))[1].spec)
    before = untrained.save_weights_and_get_sampling_client()
    other = before.compute_logprobs(before.prompt(picture, "a red disc")).result()
    assert moved(scores, other) > 0.1

    def told() -> tuple[list[int], list[float]]:
        answer = theirs.sample(theirs.prompt(picture), 1, GREEDY).result().sequences[0]
        scored = theirs.compute_logprobs(theirs.prompt(picture, "a red disc")).result()
        return answer.tokens, scored

    for killed in (False, True):
        if killed:
            served.kill()
            served.start()
        tokens, scored = told()
        assert tokens == right.tokens
        assert moved(scored, scores) < 1e-4
    body = {"model": "named", "prompt": "a red", "max_tokens": 4, "temperature": 0.0}
    said = served.post("/v1/completions", body).json()["choices"][0]["text"]
    prompt = plait.ModelInput.from_ints(mine.get_tokenizer()("a red").input_ids)
    four = plait.SamplingParams(max_tokens=4, temperature=0.0)
    tokens = mine.sample(prompt, 1, four).result().sequences[0].tokens
    assert said == mine.get_tokenizer().decode(tokens, skip_special_tokens=True)


def test_the_page_s_own_words(
    served: Any, local: plait.ServiceClient, trained: Path, picture_folder: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """docs/serving.md asks a trained run; its program prints what the run says."""
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (block,) = [one for one in blocks if 'base_model="stamps"' in one]
    here = block.replace("http://127.0.0.1:8000", served.url).replace('"stamps"', '"named"')
    shutil.copy(picture_folder / "disc" / "00.png", tmp_path / "cat.png")
    monkeypatch.chdir(tmp_path)
    exec(compile(here, "serving.md", "exec"), {})
    mine = local.create_sampling_client(trained)
    greedy = plait.SamplingParams(max_tokens=24, temperature=0)
    answer = mine.sample(mine.prompt(plait.Image("cat.png")), 1, greedy).result()
    right = mine.get_tokenizer().decode(answer.sequences[0].tokens, skip_special_tokens=True)
    assert capsys.readouterr().out == f"{right}\n"


def test_a_loop_goes_on_from_it(
    remote: Any, local: plait.ServiceClient, trained: Path, picture: plait.Image
) -> None:
    """With the weights and the adapter that it has; one of another kind is refused."""
    best = next((trained / "checkpoints").glob("best-*"))
    asked = plait.Message("user", (picture, "what is this?"))
    sample = plait.Sample((asked, plait.Message("assistant", "a red disc")))
    told = []
    for client in (
        remote.create_lora_training_client("named", rank=4),
        local.create_training_client_from_state(str(best)),
    ):
        data = [client.datum(sample)]
        losses = []
        for _ in range(3):
            future = client.forward(data, "cross_entropy")
            losses.append(future.result().metrics["loss:sum"])
            client.forward_backward(data, "cross_entropy")
            client.optim_step(plait.AdamParams(learning_rate=1e-3)).result()
        told.append(losses)
    assert told[0][0] == pytest.approx(told[1][0], abs=1e-4)
    assert told[0][2] < told[0][0]
    with pytest.raises(PlaitError, match=r"lora\.rank 4"):
        remote.create_lora_training_client("named", rank=8)


def test_what_it_offers_stays(trained: Path, tmp_path: Path) -> None:
    """A run that trains on while a server stands changes nothing of what is offered."""
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    name, offer = offer_of_argument(str(run))
    assert name == "run" and offer.weights == next((run / "checkpoints").glob("best-*"))
    shutil.copytree(offer.weights, run / "checkpoints" / "best-999999")
    assert offer_of_argument(str(run))[1].weights == run / "checkpoints" / "best-999999"
    assert offer_of_argument(f"{offer.weights}")[1] == offer


def test_folders_without_weights(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ConfigError, match="without trained weights yet"):
        offer_of_argument(str(tmp_path / "run"))
    damaged = tmp_path / "damaged"
    shutil.copytree(next((trained / "checkpoints").glob("best-*")), damaged)
    text = (damaged / "manifest.json").read_text()
    (damaged / "manifest.json").write_text(text.replace('"rank": 4', '"rank": 5'))
    with pytest.raises(ConfigError, match="damaged"):
        offer_of_argument(str(damaged))


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"rank": 8}, "lora.rank 4"),
        ({"rank": 4, "alpha": 8.0}, "lora.alpha 32.0"),
        ({"rank": 4, "train_unembed": True}, "lora.targets"),
        ({"rank": 4, "train": ["projector"]}, "train="),
        (None, "trained with one"),
    ],
)
def test_an_adapter_of_another_kind(asked: Any, named: str, tmp_path: Path) -> None:
    offer = Offer(ModelSpec(language="tiny", lora=LoraSpec(rank=4)), tmp_path)
    fits = {"rank": 4, "dropout": 0.2, "train_unembed": False}
    assert training_spec(offer, fits)[0].lora == LoraSpec(rank=4, dropout=0.2)
    with pytest.raises(ServiceError) as refused:
        training_spec(offer, asked and {"train_unembed": False, **asked})
    assert named in refused.value.message and refused.value.status == 422
    whole = Offer(ModelSpec(language="tiny", lora=None), tmp_path)
    assert training_spec(whole, None)[0].lora is None
    with pytest.raises(ServiceError, match="trained without an adapter"):
        training_spec(whole, fits)


def test_the_recipe_says_of_what_kind_an_adapter_is(tmp_path: Path) -> None:
    """What clients cannot say: it is neither dropped nor refused."""
    lora = LoraSpec(rank=4, dora=True, rslora=True)
    for weights in (None, tmp_path):
        offer = Offer(ModelSpec(language="tiny", lora=lora), weights)
        assert training_spec(offer, {"rank": 4, "train_unembed": False})[0].lora == lora
