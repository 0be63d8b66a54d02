"""Media of commands that wait are decoded in threads, so that their turn finds them ready.

What is not begun when its turn comes is decoded in the turn, so that nobody ever waits for room.
An error is kept, and raised where the item is taken: at the command that owns it.
"""

import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from plait.datasets.decoding import Decoder
from plait.errors import DataError
from plait.stream import Document, Item, ItemInputs
from plait.trainer.build import Built
from plait.trainer.engine.commands import Command, ForwardBackward, Sample

WORKERS = 2
"""Threads; sounds and films are decoded in as many processes, see `Decoder`."""

MOST_BYTES = 256 << 20
"""Nothing is begun while more than that waits for its turn; what each thread has begun by then may
come on top."""


class _Entry:
    """An item that is, or will be, decoded ahead."""

    def __init__(self, item: Item, built: Built, hashed: bool) -> None:
        self.item, self.built, self.hashed = item, built, hashed
        self.key = (id(item), id(built))
        self.loaded: Future[ItemInputs] | None = None
        """None before it is begun."""

        self.weight = 0
        """Bytes held for its turn, once it is decoded."""

        self.gone = False
        """Nobody will take it any more."""


class Ahead:
    """Decodes and processes media, before they are asked for where there is time.

    Args:
        decoder: For any number of threads.
        most_bytes: Of decoded media that wait.
    """

    def __init__(self, decoder: Decoder, most_bytes: int = MOST_BYTES) -> None:
        self._decoder, self._most = decoder, most_bytes
        self._lock = threading.Lock()
        self._entries: dict[tuple[int, int], list[_Entry]] = {}
        """By the identities of an item, and of whose encoder reads it; entries keep both alive."""

        self._of: dict[int, list[_Entry]] = {}
        """All entries of a command that is not done, by its identity."""

        self._pending: deque[_Entry] = deque()
        self._working = self._held = 0
        self._pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="plait-ahead")

    @property
    def held_bytes(self) -> int:
        """Of what is decoded and not taken."""
        return self._held

    @property
    def waiting(self) -> int:
        """Items of commands that are not done, neither taken nor dropped."""
        with self._lock:
            return sum(map(len, self._entries.values()))

    def queue(self, command: Command, built: Built) -> None:
        """Decode a command's media when there is room, behind those of earlier commands."""
        hashed = isinstance(command, Sample)
        entries = [_Entry(item, built, hashed) for item in _items(command)]
        if not entries:
            return
        with self._lock:
            self._of[id(command)] = entries
            for entry in entries:
                self._entries.setdefault(entry.key, []).append(entry)
            self._pending += entries
            self._begin()

    def drop(self, command: Command) -> None:
        """Forget what a command that has ended did not take."""
        with self._lock:
            for entry in self._of.pop(id(command), ()):
                if not entry.gone:
                    self._remove(entry)
            self._begin()

    def load(self, document: Document, built: Built) -> list[ItemInputs]:
        """A document's media, decoded and processed.

        Raises:
            DataError: an item cannot be; it names the item's dataset, row and file.
        """
        return [self._take(item, built) for item in document.items]

    def _take(self, item: Item, built: Built) -> ItemInputs:
        with self._lock:
            entries = self._entries.get((id(item), id(built)))
            if entries:
                loaded = entries[0].loaded  # an item may be in several commands: that of the first
                self._remove(entries[0])
                self._begin()
            else:
                loaded = None
        return self._decoded(item, built) if loaded is None else loaded.result()

    def _remove(self, entry: _Entry) -> None:
        """Nobody waits for it any more; call it with the lock held."""
        entry.gone = True
        self._held -= entry.weight
        entries = self._entries[entry.key]
        entries.remove(entry)
        if not entries:
            del self._entries[entry.key]

    def _begin(self) -> None:
        """Give threads what is next, while there is room; call it with the lock held."""
        while self._pending and self._working < WORKERS and self._held <= self._most:
            entry = self._pending.popleft()
            if not entry.gone:
                entry.loaded = Future()
                self._working += 1
                try:
                    self._pool.submit(self._work, entry, entry.loaded)
                except RuntimeError:  # the interpreter ends: the rest is decoded in its turn
                    entry.loaded = None
                    self._working -= 1
                    self._pending.clear()

    def _work(self, entry: _Entry, loaded: "Future[ItemInputs]") -> None:
        try:
            inputs = self._decoded(entry.item, entry.built)
            if entry.hashed:
                inputs.digest()  # which a sampler asks for
            error = None
        except BaseException as one:  # whatever it is, it is its command's
            inputs, error = None, one
        with self._lock:
            self._working -= 1
            if inputs is not None and not entry.gone:
                entry.weight = _bytes_of(inputs)
                self._held += entry.weight
            self._begin()
        if error is not None:
            loaded.set_exception(error)
        elif inputs is not None:
            loaded.set_result(inputs)

    def _decoded(self, item: Item, built: Built) -> ItemInputs:
        encoder = built.model.media_encoder(item.plan.encoder).encoder
        try:
            media = self._decoder.decode(item.part, built.limits, item.plan.wanted)
            return ItemInputs(inputs=encoder.process(media))
        except DataError as error:
            raise error.at(item.origin) from error


def _items(command: Command) -> Iterator[Item]:
    """The media of a command, in the order in which they will be asked for."""
    if isinstance(command, Sample):
        yield from command.prompt.items
    if isinstance(command, ForwardBackward):
        for batch in command.micro_batches:
            for number in batch:
                yield from command.documents[number].items


def _bytes_of(inputs: ItemInputs) -> int:
    return sum(tensor.nbytes for tensor in (inputs.inputs or {}).values())
