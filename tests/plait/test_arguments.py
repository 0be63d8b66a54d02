"""What a client is told is used or refused, never dropped."""

from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as PILImage

from plait.cli import main
from plait.client import ServiceClient, TrainingClient
from plait.errors import ConfigError, DataError, MediaError, Origin, UnknownNameError
from plait.modalities import Image, Limits, Text
from plait.stream import Message, Sample
from plait.trainer.manifest import verify
from plait.trainer.spec import ModelSpec
from plait.types import AdamParams, Datum, ImageChunk, ModelInput

Make = Callable[..., TrainingClient]


def picture(kind: str) -> bytes:
    file = BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    PILImage.fromarray(pixels).save(file, kind)
    return file.getvalue()


def shown(*parts: Any, **facts: Any) -> Sample:
    turns = (Message("user", parts), Message("assistant", (Text("a disc."),)))
    return Sample(turns, **facts)


def test_user_metadata_stands_in_what_is_saved(
    spec: ModelSpec, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    service, words = ServiceClient(tmp_path), {"ticket": "A-7", "Zweck": "schön"}
    with service.create_training_client(spec, user_metadata=words) as client:
        words["later"] = "changes nothing"
        assert client.get_info().user_metadata == {"ticket": "A-7", "Zweck": "schön"}
        client.forward_backward([client.datum(shown(Text("which")))])
        client.optim_step(AdamParams()).result()
        client.save_state("one").result()
        client.save_weights_for_sampler("two").result()
        run = tmp_path / client.run_id
    for folder in (run / "weights" / "one", run / "sampler_weights" / "two"):
        held = verify(folder)["user_metadata"]
        assert held == {"ticket": "A-7", "Zweck": "schön"}
        assert main(["info", str(folder)]) == 0
        assert "A-7" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="user_metadata must be texts by name"):
        service.create_training_client(spec, user_metadata={"run": 7})  # type: ignore[dict-item]


def test_what_a_datum_would_lose_of_a_sample_is_refused(make: Make) -> None:
    client = make()
    sample = shown(Image(picture("PNG")), origin=Origin("rows", 3))
    with pytest.raises(DataError, match=r"asks for view 2.*\(dataset rows, row 3\)"):
        client.datum(replace(sample, view=2))
    assert client.datum(replace(sample, group=0)).loss_fn_inputs, "a pair is two data"


def test_an_error_of_a_datum_names_the_row_it_came_from(make: Make, tmp_path: Path) -> None:
    client = make()
    file = tmp_path / "cut.png"
    file.write_bytes(picture("PNG"))
    datum = client.datum(shown(Image(file), Text("which"), origin=Origin("rows", 3)))
    again = Datum(ModelInput(tuple(datum.model_input.chunks)), datum.loss_fn_inputs)
    assert again.model_input == datum.model_input
    file.write_bytes(file.read_bytes()[:300])
    where = rf"\(dataset rows, row 3, file {file}\)"
    with pytest.raises(MediaError, match=where):
        client.forward_backward([again]).result()
    file.unlink()
    with pytest.raises(MediaError, match=where):
        client.forward_backward([again])
    file.write_bytes(picture("PNG"))
    with pytest.raises(DataError, match=r"target_tokens needs one value.*\(dataset rows, row 3\)"):
        client.forward_backward([Datum(datum.model_input, {"target_tokens": [1]})])


def test_a_chunks_format_must_be_that_of_its_bytes(make: Make) -> None:
    client = make()

    def forward(data: bytes | Image, named: Any) -> float:
        chunk = ImageChunk(data, named)
        tokens = ModelInput((chunk,)).append_int(5)
        datum = Datum(tokens, {"target_tokens": [0, 0, 0, 5, 9], "weights": [0, 0, 0, 1, 1]})
        return client.forward([datum]).result().metrics["loss:sum"]

    png, jpeg = picture("PNG"), picture("JPEG")
    assert forward(png, "png") == forward(png, None) > 0
    assert forward(jpeg, "jpeg") > 0
    for data, named, found in [(png, "jpeg", "PNG"), (jpeg, "png", "JPEG"),
                               (Image(np.zeros((8, 8, 3), np.uint8)), "png", "array")]:  # fmt: skip
        with pytest.raises(DataError, match=f"is {found}; the chunk says '{named}'"):
            forward(data, named)
    with pytest.raises(UnknownNameError, match="unknown picture format 'webp'"):
        forward(png, "webp")


def test_the_service_s_limits_hold_for_all_that_is_read(spec: ModelSpec, tmp_path: Path) -> None:
    small = ServiceClient(tmp_path, limits=Limits(max_image_pixels=100))
    with (
        small.create_training_client(spec) as client,
        pytest.raises(MediaError, match="raise max_image_pixels"),
    ):
        client.datum(shown(Image(picture("PNG"))))
    side = int(Limits().max_image_pixels ** 0.5) + 1
    stream = BytesIO()
    PILImage.new("L", (side, side)).save(stream, "PNG", compress_level=1)
    large = ServiceClient(tmp_path, limits=Limits(max_image_pixels=side * side))
    with large.create_training_client(spec) as client:
        datum = client.datum(shown(Image(stream.getvalue())))
        [chunk, *rest] = datum.model_input.chunks
        assert isinstance(chunk, ImageChunk)
        named = ModelInput((replace(chunk, format="png"), *rest))
        again = Datum(named, datum.loss_fn_inputs)
        assert client.forward([again]).result().metrics["loss:sum"] > 0


def test_an_address_is_that_of_a_web_server() -> None:
    with pytest.raises(ConfigError, match="begins with http:// or https://; got tinker://run"):
        ServiceClient("tinker://run")
