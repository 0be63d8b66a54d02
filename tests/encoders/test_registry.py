"""Encoders by name, and the README's example run as an installed package."""

import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from plait.encoders import registry
from plait.encoders.base import Encoder
from plait.errors import ConfigError, UnknownNameError

README = Path(registry.__file__).with_name("README.md")


def install(folder: Path, module: str, source: str, entries: str) -> None:
    """What pip leaves behind: a module, and the metadata of its distribution."""
    folder.mkdir(exist_ok=True)
    (folder / f"{module}.py").write_text(source)
    info = folder / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[plait.encoders]\n{entries}\n")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").is_relative_to(tmp_path):
            del sys.modules[name]


def test_the_readmes_example_is_found_through_its_entry_point(
    site: Path, make_picture: Any
) -> None:
    blocks = re.findall(r"```(python|toml)\n(.*?)```", README.read_text(), flags=re.DOTALL)
    (_, module), (_, entries), (_, use) = blocks
    named = tomllib.loads(entries)["project"]["entry-points"]["plait.encoders"]
    lines = "\n".join(f"{name} = {value}" for name, value in named.items())
    install(site, "mean_colour", module, lines)
    assert "mean_colour" in registry.names()
    scope: dict[str, Any] = {}
    exec(use, scope)
    encoder = scope["encoder"]
    assert isinstance(encoder, Encoder) and encoder.name == "mean_colour"
    assert not encoder.training and not any(p.requires_grad for p in encoder.parameters())
    inputs = [encoder.process(make_picture(4, 6, seed)) for seed in range(2)]
    for item, made in zip(inputs, encoder(inputs), strict=True):
        assert made.embeddings.shape == (1, 16) and made.grid == encoder.plan(None)
        torch.testing.assert_close(made.embeddings, encoder([item])[0].embeddings)
    white = np.full((2, 2, 3), 255, dtype=np.uint8)
    assert torch.equal(encoder.process(white)["colour"], torch.ones(3))


def test_the_readme_names_every_built_in_encoder() -> None:
    table = README.read_text().partition("| name |")[2].partition("\n\n")[0]
    named = re.findall(r"^\| `(\w+)` \|", table, flags=re.MULTILINE)
    assert sorted(named) == sorted(registry.BUILT_IN)


def test_every_built_in_name_leads_to_an_encoder() -> None:
    for name in registry.BUILT_IN:
        made = registry._load(name)
        assert isinstance(made, type) and issubclass(made, Encoder)
        folder = README.parent / name
        for part in ("__init__.py", "encoder.py", "README.md"):
            assert (folder / part).is_file()


def test_unknown_names_and_options_offer_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'hf_vision'"):
        registry.create("hf_visoin")
    with pytest.raises(UnknownNameError, match="did you mean 'weights'"):
        registry.create("efficientnet_lite", weight="folder")
    with pytest.raises(ConfigError, match="needs weights"):
        registry.create("hf_vision")


def test_an_encoder_may_be_called_otherwise(tiny_vision: Path) -> None:
    made = registry.create("hf_vision", weights=tiny_vision, name="left-eye")
    assert made.name == "left-eye"
    for wrong in ("a.b", "", 5):
        with pytest.raises(ConfigError, match=f"the option 'name' of 'hf_vision' is {wrong!r}"):
            registry.create("hf_vision", weights=tiny_vision, name=wrong)


def test_two_packages_of_one_name_are_refused(site: Path) -> None:
    install(site, "thief", "", "hf_vision = thief:Encoder")
    with pytest.raises(ConfigError, match=r"'hf_vision' is both .*thief:Encoder"):
        registry.create("hf_vision", weights="x")


def test_a_broken_package_is_named(site: Path) -> None:
    install(site, "broken", "import nothing_of_this_name", "broken = broken:Encoder")
    with pytest.raises(ConfigError, match=r"'broken'.*cannot be imported"):
        registry.create("broken")
    install(site, "other", "def make(): return 3", "other = other:make")
    with pytest.raises(ConfigError, match="returned int"):
        registry.create("other")


def test_the_registry_imports_no_encoder() -> None:
    program = (
        "import sys, plait, plait.encoders.registry as r; r.names(); "
        "print([m for m in sys.modules if m.startswith(('transformers', 'torchvision'))])"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
