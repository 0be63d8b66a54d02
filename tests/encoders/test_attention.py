"""Every tower attends through interval attention, and what it cannot compute is refused by name."""

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Siglip2VisionConfig, Siglip2VisionModel
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

from plait.encoders import attention
from plait.encoders.attention import EVERYTHING, attend, attending, packed, stretches
from plait.encoders.hf_audio.encoder import HfAudio
from plait.encoders.hf_audio.model import FAMILIES as SOUND_FAMILIES
from plait.encoders.hf_video.encoder import HfVideo
from plait.encoders.hf_video.model import FAMILIES as FILM_FAMILIES
from plait.encoders.hf_vision.encoder import HfVision
from plait.encoders.hf_vision.model import FAMILIES as PICTURE_FAMILIES
from plait.errors import ModelError
from plait.kernels.interval_attention import ROUTES, Intervals

CPU = torch.device("cpu")
CAUSAL = Intervals(torch.zeros(3, dtype=torch.long), torch.arange(1, 4))
ROW = torch.randn(1, 2, 3, 4, generator=torch.Generator().manual_seed(0))


def neighbour(name: str) -> Any:
    """Another test file of this folder, whose tiny checkpoints are used here as well."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PICTURES, SOUNDS, FILMS = map(neighbour, ("test_hf_vision", "test_hf_audio", "test_hf_video"))


def picture_tower(family: str, folder: Path) -> tuple[Any, list[dict[str, Tensor]]]:
    model, processor = PICTURES.build(family)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    encoder = HfVision(folder)
    shapes = [(40, 40, 3), (33, 60, 3), (61, 33, 3)]
    random = torch.Generator().manual_seed(1)
    pictures = [torch.randint(0, 256, s, generator=random, dtype=torch.uint8) for s in shapes]
    return encoder, [encoder.process(picture.numpy()) for picture in pictures]


def sound_tower(family: str, folder: Path) -> tuple[Any, list[dict[str, Tensor]]]:
    model, extractor = SOUNDS.build(family)
    model.save_pretrained(folder)
    extractor.save_pretrained(folder)
    encoder = HfAudio(folder)
    return encoder, [encoder.process(SOUNDS.sound(n, n)) for n in (16_000, 7_777, 12_000)]


def film_tower(family: str, folder: Path) -> tuple[Any, list[dict[str, Tensor]]]:
    del family
    encoder = HfVideo(FILMS.save(folder))
    films = [FILMS.read(encoder, FILMS.film(frames)) for frames in (9, 20)]
    return encoder, [encoder.process(film) for film in films]


TOWERS: dict[str, Any] = (
    dict.fromkeys(PICTURES.FAMILIES, picture_tower)
    | dict.fromkeys(SOUNDS.FAMILIES, sound_tower)
    | {"videomae": film_tower}
)


def test_the_walk_below_leaves_no_family_out() -> None:
    assert len(PICTURE_FAMILIES) == len(set(PICTURES.FAMILIES) - {"clip uncropped"})
    assert {name.split()[0] for name in SOUNDS.FAMILIES} == set(SOUND_FAMILIES)
    assert FILM_FAMILIES == ("videomae",)


@pytest.mark.parametrize("name", TOWERS)
def test_each_layer_of_a_tower_attends_here_and_as_its_own_code_would(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    encoder, inputs = TOWERS[name](name, tmp_path)
    calls: list[str] = []

    def counted(module: nn.Module, *args: Any, **options: Any) -> Any:
        calls.append(type(module).__name__)
        return attend(module, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(attention, "attend", counted)
        attention.register()
        made = encoder(inputs)
    attention.register()
    alone = [encoder([item])[0] for item in inputs]
    for together, single in zip(made, alone, strict=True):
        torch.testing.assert_close(together.embeddings, single.embeddings, rtol=1e-4, atol=1e-5)
    depth = 3 if not isinstance(encoder, HfVideo) else len(encoder.model.encoder.layer)
    own = getattr(SOUND_FAMILIES.get(name.split()[0]), "own_attention", False)
    assert len(calls) % depth == 0 and bool(calls) != own


def test_siglip2_drops_the_keyword_and_is_told_all_the_same(tmp_path: Path) -> None:
    """With the keyword alone its layers raise; none attends to what it must not see."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    config = Siglip2VisionConfig(**sizes, num_attention_heads=2, patch_size=8, num_patches=16)
    attention.register()
    config._attn_implementation = attention.NAME
    model = Siglip2VisionModel(config).eval()
    patches, shapes = torch.randn(2, 6, 192), torch.tensor([[2, 3], [2, 2]])
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    visible = stretches([6, 4], 6, CPU)
    inputs = {"pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": shapes}
    with pytest.raises(ModelError, match=r"drops the keyword `visible`; call it inside"):
        model(**inputs, visible=visible)
    with attending(visible), torch.no_grad():
        ours = model(**inputs).last_hidden_state
    model.set_attn_implementation("eager")
    with torch.no_grad():
        theirs = model(**inputs).last_hidden_state
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours[1, :4], theirs[1, :4], rtol=1e-4, atol=1e-5)


def test_what_a_tower_sees_ends_with_the_context() -> None:
    layer = nn.Identity()
    with attending(EVERYTHING):
        with attending(CAUSAL):
            causal, _ = attend(layer, ROW, ROW, ROW, None)
        whole, _ = attend(layer, ROW, ROW, ROW, None)
    expected = torch.nn.functional.scaled_dot_product_attention
    torch.testing.assert_close(causal.transpose(1, 2), expected(ROW, ROW, ROW, is_causal=True))
    torch.testing.assert_close(whole.transpose(1, 2), expected(ROW, ROW, ROW))
    with pytest.raises(ModelError, match="Identity attends without intervals"):
        attend(layer, ROW, ROW, ROW, None)


def test_a_batch_is_read_as_one_row() -> None:
    random = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(2, 2, 5, 4, generator=random) for _ in range(3))
    made, _ = attend(nn.Identity(), q, k, v, None, visible=stretches([5, 3], 5, CPU))
    for number, length in enumerate((5, 3)):
        alone, _ = attend(
            nn.Identity(), *(t[number : number + 1, :, :length] for t in (q, k, v)), None,
            visible=packed([length], CPU),
        )  # fmt: skip
        torch.testing.assert_close(made[number, :length], alone[0])


@pytest.mark.parametrize("softcap", [None, 0.7])
def test_sinks_and_caps_are_those_of_transformers(softcap: float | None) -> None:
    module = nn.Module().eval()
    module.num_key_value_groups = 2  # type: ignore[assignment]
    sinks = nn.Parameter(torch.tensor([0.3, -1.0, 2.0, 0.1]))
    module.sinks = sinks
    random = torch.Generator().manual_seed(3)
    q = torch.randn(1, 4, 3, 8, generator=random)
    k, v = (torch.randn(1, 2, 3, 8, generator=random) for _ in range(2))
    made, _ = attend(module, q, k, v, None, scaling=0.4, s_aux=sinks, visible=CAUSAL)
    mask = torch.full((3, 3), -torch.inf).triu(1)[None, None]
    expected, _ = eager_attention_forward(module, q, k, v, mask, scaling=0.4)
    torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-6)
    made, _ = attend(module, q, k, v, None, scaling=0.4, softcap=softcap, visible=CAUSAL)
    scores = q @ k.repeat_interleave(2, 1).transpose(2, 3) * 0.4
    bent = scores if softcap is None else softcap * (scores / softcap).tanh()
    expected = ((bent + mask).softmax(-1) @ v.repeat_interleave(2, 1)).transpose(1, 2)
    torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"position_bias": torch.ones(3)}, "asks attention for 'position_bias'"),
        ({"dropout": 0.1}, r"attention dropout must be 0; it is 0\.1"),
        ({"indices": torch.ones(3)}, "asks attention for 'indices'"),
        ({"visible": EVERYTHING, "softcap": 2.0}, r"hides something .*\(a cap\)"),
        ({"visible": EVERYTHING, "s_aux": torch.ones(2)}, r"hides something .*\(sinks\)"),
        ({"visible": EVERYTHING, "sliding_window": 2}, r"hides something .*\(a window\)"),
        ({"visible": EVERYTHING, "is_causal": True}, r"hides something .*\(causality\)"),
        ({"sliding_window": 0}, "a window holds the query's own key"),
    ],
)
def test_what_is_not_computed_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelError, match=said):
        attend(nn.Identity(), ROW, ROW, ROW, None, **{"visible": CAUSAL} | options)


def test_the_window_of_a_mask_is_that_of_its_layer() -> None:
    mask = attention._Window(2, None)
    alone, _ = attend(nn.Identity(), ROW, ROW, ROW, mask, visible=CAUSAL)
    told, _ = attend(nn.Identity(), ROW, ROW, ROW, mask, visible=CAUSAL, sliding_window=2)
    plain, _ = attend(nn.Identity(), ROW, ROW, ROW, None, visible=CAUSAL, sliding_window=2)
    assert torch.equal(alone, plain) and torch.equal(told, plain)
    with pytest.raises(ModelError, match="a mask of 2 keys beside a window of 3"):
        attend(nn.Identity(), ROW, ROW, ROW, mask, visible=CAUSAL, sliding_window=3)


def test_a_mask_beside_intervals_is_refused() -> None:
    with pytest.raises(ModelError, match="asks attention for a mask of its own"):
        attend(nn.Identity(), ROW, ROW, ROW, torch.zeros(1, 1, 3, 3), visible=CAUSAL)


def test_a_causal_layer_does_not_see_everything() -> None:
    causal = nn.Module()
    causal.is_causal = True  # type: ignore[assignment]
    with pytest.raises(ModelError, match=r"Module hides something .*\(causality\)"):
        attend(causal, ROW, ROW, ROW, None, visible=EVERYTHING)


def test_the_table_of_routes_is_that_of_the_code() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "kernels.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \|.*\| (yes|no) \|$", text, re.MULTILINE)
    assert rows == [(name, "yes" if route.chosen else "no") for name, route in ROUTES.items()]
