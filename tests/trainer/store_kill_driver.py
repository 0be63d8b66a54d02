"""A loop that trains and saves, in forked children that kill themselves at a chosen moment.

A fork server, as kill_driver.py: one JSON line per attempt, {"folder", "spec", "picture", "phase",
"nth", "steps"}, answered with {"ended"}. What the loop is about to do, and what it was
told is done, stands in `folder/journal`, synced line by line; each line is a second of the store's
clock. With {"check": paths} instead of a phase it opens the store, goes on from each path by two
steps, and writes what it found to `folder/found`.
"""

import gc
import json
import os
import shutil
import sys
import traceback
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from PIL import Image as PILImage

import plait
from plait.client import ServiceClient, TrainingClient
from plait.modalities import Image, Text
from plait.stream import Message, Sample
from plait.trainer import checkpoint, lifetime, manifest, objects, store
from plait.trainer.model import PlaitModel
from plait.trainer.places import KINDS
from plait.trainer.store import Store
from plait.trainer.strict import spec_from
from plait.types import AdamParams, Datum

sys.path.insert(0, str(Path(__file__).parent))
from kill_driver import CRASHED, LATER, Countdown, around, by_the_clock

RUN, KEPT = "loop", 3
"""The run's name in the store, and how many names its exact states take by turns."""

Kill = Callable[[], None]


def half_written(kill: Kill) -> None:
    """The weights are cut off in the middle of a file."""
    original = checkpoint.save_file

    def wrapped(tensors: Any, path: Path, **options: Any) -> None:
        original(tensors, path, **options)
        os.truncate(path, path.stat().st_size // 2)
        kill()
        original(tensors, path, **options)

    checkpoint.save_file = wrapped


def half_removed(kill: Kill) -> None:
    """Of a folder that is removed one file is gone already."""
    original = shutil.rmtree

    def wrapped(path: Path, *words: Any, **options: Any) -> None:
        held = sorted(Path(path).iterdir()) if Path(path).is_dir() else []
        if held and held[0].is_file():
            held[0].unlink()
            kill()
        original(path, *words, **options)

    store.shutil.rmtree = wrapped  # the module's own, and so that of `files`


def _replaced(_: Path, target: Path) -> bool:
    return target.name.startswith(".writing-old-")


def _named(_: Path, target: Path) -> bool:
    return target.parent.name in KINDS and not target.name.startswith(".")


def _removed(source: Path, target: Path) -> bool:
    return source.parent.name in KINDS and target.parent.parent != source.parent.parent


PHASES: dict[str, Callable[[Any], None]] = {
    "nothing": lambda _: None,
    "by the clock": by_the_clock,
    "computing": lambda kill: around(PlaitModel, "score", kill),
    "optimiser step": lambda kill: around(import_module("torch.optim.adam"), "adam", kill),
    "writing weights": half_written,
    "writing the manifest": lambda kill: around(
        manifest, "write_json", kill, before=True, when=lambda path, *_: "manifest" in path.name
    ),
    "before its rename in place": lambda kill: around(
        Path, "replace", kill, before=True, when=lambda path, *_: path.suffix == ".json"
    ),
    "object made": lambda kill: around(objects.os, "link", kill),
    "object taken": lambda kill: around(
        Path, "replace", kill, before=True, when=lambda path, to: "objects" not in to.parts
        and path.stat().st_size >= objects.SMALLEST
    ),
    "writing the lifetime": lambda kill: around(lifetime, "write_sealed", kill),
    "syncing": lambda kill: around(store, "sync", kill),
    "before its name": lambda kill: around(store, "replace_folder", kill, before=True),
    "old one renamed": lambda kill: around(Path, "rename", kill, when=_replaced),
    "new one renamed": lambda kill: around(Path, "rename", kill, when=_named),
    "half removed": half_removed,
    "deleting": lambda kill: around(Path, "rename", kill, when=_removed),
    "sweeping": lambda kill: around(store, "remove_leftovers", kill),
    "sweeping objects": lambda kill: around(
        Path, "unlink", kill, when=lambda path, *_: path.parent.parent.name == "objects"
    ),
    "changing a lifetime": lambda kill: around(Store, "set_ttl", kill),
    "opening": lambda kill: around(Store, "open", kill),
    "loading": lambda kill: around(checkpoint, "load_file", kill),
    "saved, not told": lambda kill: around(Store, "save", kill),
    "told": lambda kill: around(Journal, "told", kill),
}  # fmt: skip


class Journal:
    """What is about to be done, and what is done; also the store's clock."""

    def __init__(self, file: Path) -> None:
        self._file = file.open("a+")
        self._file.seek(0)
        self.lines = [json.loads(line) for line in self._file]

    def __call__(self) -> float:
        return float(len(self.lines))

    def intends(self, does: str, path: str, **facts: Any) -> None:
        self._write({"does": does, "path": path, **facts})

    def told(self, does: str, path: str, **facts: Any) -> None:
        self._write({"did": does, "path": path, **facts})

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.lines.append(line)

    def newest(self) -> str | None:
        """The path of the last exact state that the loop was told of."""
        paths = [line["path"] for line in self.lines if line.get("did") == "save"]
        return next((path for path in reversed(paths) if "/weights/s" in path), None)


class Loop:
    """Steps, each followed by saves, and now and then by a lifetime or a deletion."""

    def __init__(self, folder: Path, spec: dict[str, Any], picture: str) -> None:
        self.journal = Journal(folder / "journal")
        self.service = ServiceClient(folder / "states", clock=self.journal)
        newest = self.journal.newest()
        if newest is None:
            self.client = self.service.create_training_client(spec_from(spec), seed=3)
            self.step = 0
        else:
            self.client, self.step = resumed(self.service, newest)
        self.client.run_id = RUN
        self.data = data_of(self.client, picture)

    def run(self, steps: int) -> None:
        while self.step < steps:
            train(self.client, self.data)
            self.step += 1
            self.save("weights", f"s{self.step % KEPT}")
            if self.step % 2 == 0:
                self.save("weights", f"brief{self.step}", ttl=9)
                self.change_lifetime(f"s{self.step % KEPT}")
            if self.step % 3 == 0:
                self.save("sampler_weights", "look")
                self.delete(f"brief{self.step // 2 * 2}")

    def save(self, kind: str, name: str, ttl: int | None = None) -> None:
        path = f"tinker://{RUN}/{kind}/{name}"
        self.journal.intends("save", path, step=self.step, ttl=ttl)
        if kind == "weights":
            saving = self.client.save_state(name, ttl, overwrite=True, cursor=self.step)
        else:
            saving = self.client.save_weights_for_sampler(name, ttl, overwrite=True)
        self.journal.told("save", path, step=self.step, ttl=ttl, digest=saving.result().digest)

    def change_lifetime(self, name: str) -> None:
        path = f"tinker://{RUN}/weights/{name}"
        self.journal.intends("ttl", path, ttl=1000)
        self.service.set_checkpoint_ttl(path, 1000)
        self.journal.told("ttl", path, ttl=1000)

    def delete(self, name: str) -> None:
        path = f"tinker://{RUN}/weights/{name}"
        if path in {row.path for row in self.service.list_checkpoints()}:
            self.journal.intends("delete", path)
            self.service.delete_checkpoint(path)
            self.journal.told("delete", path)


def resumed(service: ServiceClient, path: str) -> tuple[TrainingClient, int]:
    """A client that goes on from a saved state, and after which step."""
    client = service.create_training_client_from_state_with_optimizer(path)
    assert client.restored is not None
    return client, int(client.restored.cursor)


def data_of(client: TrainingClient, picture: str) -> list[Datum]:
    """A text and a picture."""
    asked = [(Text("the shape"),), (Text("which: "), Image(picture))]
    answer = Message("assistant", (Text("a red disc."),))
    return [client.datum(Sample(messages=(Message("user", one), answer))) for one in asked]


def train(client: TrainingClient, data: list[Datum]) -> None:
    """One step, whose next step's first half is left pending."""
    client.forward_backward(data)
    client.optim_step(AdamParams(learning_rate=0.02, weight_decay=0.1))
    client.forward_backward(data[:1])


def found(folder: Path, picture: str, paths: list[str]) -> dict[str, Any]:
    """What lies in a store once it is opened, and the digest two steps after each state."""
    service = ServiceClient(folder / "states", clock=Journal(folder / "journal"))
    rows = service.list_checkpoints()
    objects_left = list((folder / "states" / "objects").glob("*/*"))
    result: dict[str, Any] = {
        "listed": {row.path: [row.digest, row.expires_at, row.problem] for row in rows},
        "unused": [path.name for path in objects_left if path.stat().st_nlink == 1],
        "aside": [str(path) for path in (folder / "states").rglob(".writing-*")],
        "later": {},
    }
    for path in paths:
        if "/sampler_weights/" in path:
            service.create_sampling_client(path).close()
            continue
        client, step = resumed(service, path)
        data = data_of(client, picture)
        for _ in range(2):
            train(client, data)
        saving = client.save_state("later", overwrite=True, cursor=step + 2)
        result["later"][path] = [step, saving.result().digest]
        client.close()
    service.close()
    return result


def child(asked: dict[str, Any]) -> None:
    folder, code = Path(asked["folder"]), CRASHED
    output = os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    try:
        if "check" in asked:
            told = found(folder, asked["picture"], asked["check"])
            (folder / "found").write_text(json.dumps(told))
            os._exit(0)
        moment = Countdown(asked["nth"])
        PHASES[asked["phase"]](moment)
        loop = Loop(folder, asked["spec"], asked["picture"])
        loop.run(asked["steps"])
        loop.service.close()
        print(f"{asked['phase']}: {moment.calls} moments")
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def serve() -> None:
    torch.set_num_threads(1)
    PILImage.init()
    for name in LATER:
        import_module(name)
    gc.collect()
    gc.freeze()
    print("ready", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        number = os.fork()
        if number == 0:
            child(asked)
        _, status = os.waitpid(number, 0)
        print(json.dumps({"ended": os.waitstatus_to_exitcode(status)}), flush=True)


if __name__ == "__main__":
    assert plait.__file__
    serve()
