"""An adapter on the output layer: scored, trained, sampled and exported like any other."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import plait
from plait.kernels.token_logprobs import naive, token_logprobs, weighted_nll
from plait.trainer.export import export
from plait.trainer.source import Source

Datum, ModelInput = plait.Datum, plait.ModelInput


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("count", [1, 3])
def test_an_adapter_is_as_if_the_weight_held_it(softcap: float | None, count: int) -> None:
    """Logprobs, entropies and all gradients, against float64 on hidden W^T + down up^T."""
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, 6, generator=draw, requires_grad=True)
    weight = torch.randn(11, 6, generator=draw)
    down = torch.randn(7, 2, generator=draw, requires_grad=True)
    up = torch.randn(11, 2, generator=draw, requires_grad=True)
    targets = torch.randint(11, (7, count), generator=draw)
    slopes = torch.randn(7, count, generator=draw)
    leaves = [hidden, down, up]
    joined = [torch.cat([hidden, down], 1), torch.cat([weight, up], 1)]
    right = naive.token_logprobs(*joined, targets, softcap)
    expected = torch.autograd.grad((right * slopes).sum() + naive.entropy(*joined, softcap).sum(),
                                   leaves)  # fmt: skip
    found = token_logprobs(
        hidden, weight, targets, softcap=softcap, entropy=True, adapter=(down, up)
    )
    torch.testing.assert_close(found.logprobs.double(), right, rtol=1e-5, atol=1e-5)
    assert found.entropy is not None
    made = torch.autograd.grad((found.logprobs * slopes).sum() + found.entropy.sum(), leaves)
    for mine, theirs in zip(made, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    loss, logprobs = weighted_nll(
        hidden, weight, targets, slopes, softcap=softcap, adapter=(down, up)
    )
    torch.testing.assert_close(logprobs, found.logprobs.detach())
    right_loss = naive.weighted_nll(*joined, targets, slopes, softcap)
    torch.testing.assert_close(loss.double(), right_loss, rtol=1e-5, atol=1e-5)
    expected = torch.autograd.grad(right_loss, leaves)
    for mine, theirs in zip(torch.autograd.grad(loss, leaves), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_an_adapter_that_does_not_fit_is_refused() -> None:
    hidden, weight, targets = torch.zeros(3, 4), torch.zeros(5, 4), torch.zeros(3, dtype=torch.long)
    with pytest.raises(ValueError, match=r"an adapter is down \(3, R\) and up \(5, R\)"):
        token_logprobs(hidden, weight, targets, adapter=(torch.zeros(3, 2), torch.zeros(5, 1)))
    with pytest.raises(ValueError, match="the weight is frozen; this one trains"):
        token_logprobs(
            hidden, weight.requires_grad_(), targets,
            adapter=(torch.zeros(3, 2), torch.zeros(5, 2)),
        )  # fmt: skip


@pytest.fixture
def tied_language(tiny_language: Path, tmp_path: Path) -> Path:
    """The tiny language model, whose output layer is its embeddings."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "tied"
    shutil.copytree(tiny_language, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    weights = load_file(folder / "model.safetensors")
    weights.pop("lm_head.weight", None)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def datum(*tokens: int) -> Datum:
    return Datum(ModelInput.from_ints(tokens[:-1]), {"target_tokens": tokens[1:]})


def trained(client: Any, data: list[Datum], steps: int = 5) -> None:
    for _ in range(steps):
        client.forward_backward(data)
        client.optim_step(plait.AdamParams(learning_rate=3e-2)).result()


def logprobs(client: Any, data: list[Datum]) -> list[float]:
    rows = client.forward(data).result().loss_fn_outputs
    return [value for row in rows for value in row["logprobs"].tolist()]


@pytest.mark.parametrize("merge", [False, True])
def test_what_trains_there_is_sampled_from_and_exported(
    tied_language: Path, tmp_path: Path, merge: bool
) -> None:
    data = [datum(5, 6, 7, 8, 9)]
    with plait.ServiceClient(tmp_path / "states") as service:
        client = service.create_lora_training_client(
            str(tied_language), rank=4, train_attn=False, train_mlp=False, train_unembed=True
        )
        names = [name for _, name, _ in client._built.model.trainable()]
        assert len(names) == 2 and all(".lm_head.lora_" in name for name in names)
        embeddings = client._built.model.language.get_input_embeddings().weight.clone()
        before = logprobs(client, data)
        trained(client, data)
        after = logprobs(client, data)
        assert sum(after) > sum(before) + 1
        assert torch.equal(client._built.model.language.get_input_embeddings().weight, embeddings)
        here = client.save_weights_and_get_sampling_client()
        scored = here.compute_logprobs(ModelInput.from_ints([5, 6, 7, 8, 9])).result()
        torch.testing.assert_close(torch.tensor(scored[1:]), torch.tensor(after))
        greedy = plait.SamplingParams(max_tokens=1, temperature=0.0)
        drawn = here.sample(ModelInput.from_ints([5]), 1, greedy).result().sequences[0]
        again = logprobs(client, [datum(5, drawn.tokens[0])])
        torch.testing.assert_close(torch.tensor(drawn.logprobs), torch.tensor(again))
        path = client.save_state("one").result().path
        compared = export(Source(client._store, path), tmp_path / "out", merge=merge).compared
        assert compared.largest_difference < 1e-4 < compared.trained_change


def test_runs_with_and_without_share_rows(tied_language: Path, tmp_path: Path) -> None:
    """What each learns, and samples, is what it does alone."""
    data = [datum(5, 6, 7, 8, 9), datum(9, 8, 7)]

    def clients(service: plait.ServiceClient) -> list[Any]:
        return [
            service.create_lora_training_client(
                str(tied_language), rank=rank, seed=rank, train_unembed=unembed
            )
            for rank, unembed in ((4, True), (2, False), (3, True))
        ]

    with plait.ServiceClient(tmp_path / "a") as service:
        together = clients(service)
        for _ in range(3):
            for client in together:
                client.forward_backward(data)
                client.optim_step(plait.AdamParams(learning_rate=1e-2))
        prompt, greedy = ModelInput.from_ints([5, 6]), plait.SamplingParams(max_tokens=3, seed=1)
        views = [client.save_weights_and_get_sampling_client() for client in together]
        drawn = [view.sample(prompt, 1, greedy) for view in views]
        found = [(logprobs(c, data), d.result()) for c, d in zip(together, drawn, strict=True)]
    for number in range(3):
        with plait.ServiceClient(tmp_path / "b") as service:
            client = clients(service)[number]
            for _ in range(3):
                client.forward_backward(data)
                client.optim_step(plait.AdamParams(learning_rate=1e-2))
            view = client.save_weights_and_get_sampling_client()
            alone = logprobs(client, data), view.sample(prompt, 1, greedy).result()
        torch.testing.assert_close(
            torch.tensor(found[number][0]), torch.tensor(alone[0]), rtol=1e-4, atol=1e-4
        )
        mine, theirs = found[number][1].sequences[0], alone[1].sequences[0]
        assert mine.tokens == theirs.tokens
        torch.testing.assert_close(
            torch.tensor(mine.logprobs), torch.tensor(theirs.logprobs), rtol=1e-4, atol=1e-4
        )


def test_all_linear_of_a_later_run_is_not_the_output_layer(
    tied_language: Path, tmp_path: Path
) -> None:
    with plait.ServiceClient(tmp_path / "states") as service:
        service_first = service.create_lora_training_client(str(tied_language), train_unembed=True)
        second = service.create_lora_training_client(str(tied_language), rank=4)
        names = [name for _, name, _ in second._built.model.trainable()]
        assert names and not any("lm_head" in name for name in names)
        del service_first
