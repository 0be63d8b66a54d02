"""The unchanged tinker client trains on sounds and films, and samples from them."""

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

import plait
from plait.service.catalog import offer_of_argument, training_spec

TOKENS, TARGETS = [5, 6, 7, 8], [6, 7, 8, 9]


def test_sounds_and_films_are_what_they_are_in_process(
    seeing: Any,
    seeing_recipe: Path,
    run_tinker: Callable[..., dict[str, Any]],
    write_sound: Callable[[Path, int], None],
    write_film: Callable[[Path, int], None],
    tmp_path: Path,
) -> None:
    files = {"audio": tmp_path / "tone.wav", "video": tmp_path / "film.mp4"}
    write_sound(files["audio"], 3)
    write_film(files["video"], 4)
    encoded = {name: base64.b64encode(file.read_bytes()).decode() for name, file in files.items()}
    asked = {"tokens": TOKENS, "targets": TARGETS, **encoded}
    told = run_tinker(seeing, "0.38.0", "media", asked)
    spec, seed = training_spec(
        offer_of_argument(str(seeing_recipe))[1], {"rank": 4, "seed": 3, "train_unembed": False}
    )
    with plait.ServiceClient() as service:
        client = service.create_training_client(spec, seed=seed)
        kinds: dict[str, Any] = {"audio": plait.AudioChunk, "video": plait.VideoChunk}
        for medium, make in kinds.items():
            length = told[medium]["length"]
            chunk = make(files[medium].read_bytes(), expected_tokens=length)
            prompt = plait.ModelInput((chunk, plait.EncodedTextChunk(TOKENS)))
            inputs = {
                "target_tokens": [0] * length + TARGETS,
                "weights": [0.0] * length + [1.0] * len(TARGETS),
            }
            made = client.forward_backward([plait.Datum(prompt, inputs)]).result()
            client.optim_step(plait.AdamParams(learning_rate=1e-2)).result()
            sampler = client.save_weights_and_get_sampling_client()
            greedy = plait.SamplingParams(max_tokens=4, temperature=0.0)
            drawn = sampler.sample(prompt, 1, greedy).result().sequences[0].tokens
            right = made.metrics["loss:sum"]
            assert abs(told[medium]["trained"]["metrics"]["loss:sum"] - right) < 1e-4
            assert told[medium]["drawn"] == drawn
    assert told["foreign"]["category"] == "user"
    assert "plait.tinker_compat" in told["foreign"]["says"]
