"""Damaged messages: every reader gives a value or an error of Plait's, and allocates little."""

import json
import random
import resource
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from plait.errors import DataError, PlaitError
from plait.service.wire import chunks, counting, sampling, tensors, training
from plait.service.wire import tinker_pb2 as pb
from plait.types import TensorData


def message() -> pb.ForwardBackwardRequest:
    """A request with each kind of chunk and of tensor."""
    made = pb.ForwardBackwardRequest(model_id="run", seq_id=1, loss_fn="cross_entropy")
    made.loss_fn_config_v2["beta"].number = 0.1
    datum = made.data.add()
    tokens = np.arange(6, dtype="<i4").tobytes()
    datum.model_input.add(encoded_text=pb.EncodedTextChunk(tokens=tokens))
    datum.model_input.add(image=pb.ImageChunk(data=b"\x89PNG....", format="png", expected_tokens=3))
    head = json.dumps({"kind": "audio", "options": {"start": 1.0}, "expected": 4}).encode()
    content = chunks.MARK + chunks.LENGTHS.pack(len(head), 4) + head + b"RIFF"
    datum.model_input.add(dmel=pb.DmelChunk(dmel=bytes([4, 2, 1, 60]) + content))
    datum.loss_fn_inputs["target_tokens"].CopyFrom(tensors.tensor_to(np.arange(6)))
    sparse = datum.loss_fn_inputs["weights"]
    sparse.dtype, sparse.shape[:] = pb.DTYPE_FLOAT32, [2, 3]
    sparse.sparse_csr.values = np.ones(2, "<f4").tobytes()
    sparse.sparse_csr.crow_indices = np.array([0, 1, 2], "<i8").tobytes()
    sparse.sparse_csr.col_indices = np.array([0, 2], "<i8").tobytes()
    return made


def fuzzed(attempt: Callable[[random.Random], object], times: int) -> int:
    """How many succeed; memory does not grow."""
    before, good = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0
    for seed in range(times):
        try:
            attempt(random.Random(seed))
            good += 1
        except PlaitError as error:
            assert len(str(error)) < 2000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 700_000
    return good


def damaged(body: bytes, chance: random.Random) -> bytes:
    made = bytearray(body)
    for _ in range(chance.randint(1, 6)):
        at = chance.randrange(len(made))
        kind = chance.randrange(4)
        if kind == 0:
            made[at] = chance.randrange(256)
        elif kind == 1:
            del made[at : at + chance.randrange(1, 9)]
        elif kind == 2:
            made[at:at] = chance.randbytes(chance.randrange(1, 9))
        else:
            made[at : at + 1] = chance.choice((b"\xff" * 9 + b"\x01", b"\0", b"\x7f\xff\xff\xff"))
        if not made:
            break
    return bytes(made)


def test_the_message_itself_is_read() -> None:
    made = message()
    call = training.call_of(training.parsed(made.SerializeToString()))
    (datum,) = call.data
    assert [type(chunk).__name__ for chunk in datum.model_input.chunks] == [
        "EncodedTextChunk", "ImageChunk", "AudioChunk",
    ]  # fmt: skip
    np.testing.assert_array_equal(
        datum.loss_fn_inputs["weights"].to_numpy(), [[1, 0, 0], [0, 0, 1]]
    )


def test_damaged_requests() -> None:
    body = message().SerializeToString()
    good = fuzzed(lambda chance: training.call_of(training.parsed(damaged(body, chance))), 6000)
    assert 0 < good < 6000
    for length in range(len(body)):
        fuzzed(lambda _, cut=length: training.call_of(training.parsed(body[:cut])), 1)  # type: ignore[misc]


def test_random_requests() -> None:
    """A text of no fields is a request; 64 bytes by chance are hardly ever one."""
    good = fuzzed(lambda chance: training.call_of(training.parsed(chance.randbytes(64))), 3000)
    assert good < 300


SIZES = (-(2**63), -1, 0, 1, 2, 3, 6, 2**31, 2**40, 2**62)


def odd_tensor(chance: random.Random) -> TensorData:
    made = pb.Tensor(dtype=chance.randrange(7))  # type: ignore[arg-type]
    made.shape.extend(chance.choice(SIZES) for _ in range(chance.randrange(4)))
    if chance.random() < 0.5:
        made.dense = chance.randbytes(chance.choice((0, 1, 4, 8, 12, 24)))
    else:
        made.sparse_csr.values = chance.randbytes(chance.choice((0, 3, 4, 8)))
        crow = [chance.choice(SIZES) for _ in range(chance.randrange(5))]
        made.sparse_csr.crow_indices = np.array(crow, "<i8").tobytes()
        made.sparse_csr.col_indices = chance.randbytes(chance.choice((0, 7, 8, 16)))
    return tensors.tensor_of("x", made)


def test_tensors_of_odd_shapes() -> None:
    assert 0 < fuzzed(odd_tensor, 10_000) < 10_000


def sparse_of(shape: list[int]) -> pb.Tensor:
    made = pb.Tensor(dtype=pb.DTYPE_FLOAT32, shape=shape)
    made.sparse_csr.crow_indices = bytes(8 * (shape[0] + 1))
    return made


def test_sparse_tensors_do_not_grow_large_together() -> None:
    """Each says a shape of few bytes; all of them are counted before one is made."""
    made = message()
    for number in range(9):
        made.data[0].loss_fn_inputs[f"x{number}"].CopyFrom(sparse_of([1, tensors.MOST_VALUES // 8]))
    with pytest.raises(DataError, match="together"):
        training.call_of(made)
    with pytest.raises(DataError, match="up to"):
        tensors.tensor_of("x", sparse_of([1, tensors.MOST_VALUES + 1]))
    with pytest.raises(DataError, match="dimensions"):
        tensors.tensor_of("x", pb.Tensor(dtype=pb.DTYPE_FLOAT32, shape=[1] * 100, dense=bytes(4)))


@pytest.mark.parametrize("piece", [b"\x1a\x00", b"\x1a\x02\x0a\x00", b"\x1a\x02\x12\x00"])
def test_many_empty_parts_are_counted_before_they_are_parsed(piece: bytes) -> None:
    """Two bytes become an object of a hundred."""
    many = piece * (3 * counting.MOST_PARTS // len(piece) * 2)
    with pytest.raises(DataError, match="up to"):
        counting.check_parts(many)
    shape = pb.Tensor(shape=[1] * (2 * counting.MOST_PARTS))
    made = pb.ForwardBackwardRequest()
    made.data.add().loss_fn_inputs["x"].CopyFrom(shape)
    with pytest.raises(DataError, match="up to"):
        counting.check_parts(made.SerializeToString() + bytes([10, 0]) * counting.SMALL)


def test_a_large_request_of_few_parts_is_not_refused() -> None:
    made = message()
    made.data[0].model_input[1].image.data = bytes(2 * counting.SMALL)
    assert training.parsed(made.SerializeToString()).model_id == "run"


ODD: tuple[Any, ...] = (
    None, True, -1, 0, 3, 10**30, 1.5, float("nan"), float("inf"), "", "x", "é", "AAAA", [], {},
    [1], [[1]], ["ab", "cd"], ["abc"], {"a": 1}, {"count": 10**9}, {"fps": "x"}, "encoded_text",
    "image", "audio", "video", "dmel", "png", [2**40], "../../etc/passwd", "a" * 64,
)  # fmt: skip


def odd_chunk(chance: random.Random) -> object:
    names = ("type", "tokens", "data", "format", "expected_tokens", "options", "sha256", "dmel")
    value: Any = {name: chance.choice(ODD) for name in chance.sample(names, chance.randrange(6))}
    if chance.random() < 0.8:
        value["type"] = chance.choice(("encoded_text", "image", "audio", "video", "dmel"))
    if chance.random() < 0.5:
        keys = ("start", "end", "rate", "sound", "sampling", "source", "fps")
        value["options"] = {chance.choice(keys): chance.choice(ODD) for _ in range(2)}
        value["data"] = "AAAA"
    return sampling.input_from_json({"chunks": [value]}).chunks


def test_chunks_of_odd_json() -> None:
    assert 0 < fuzzed(odd_chunk, 20_000) < 20_000


def odd_media(chance: random.Random) -> object:
    head: Any = {"kind": chance.choice(ODD), "options": chance.choice(ODD)}
    if chance.random() < 0.8:
        head = {"kind": chance.choice(chunks.MEDIA),
                "options": {chance.choice(("start", "end", "sampling", "uploaded", "fps")):
                            chance.choice(ODD)}, "expected": chance.choice(ODD)}  # fmt: skip
    said = json.dumps(head).encode()
    if chance.random() < 0.1:
        said = b"[" * 5000
    length = chance.choice((0, 4, 2**63))
    content = chunks.MARK + chunks.LENGTHS.pack(len(said), length) + said + b"RIFF"
    return chunks.media_chunk(bytes(4) + content, chunks.nothing_uploaded)


def test_media_in_odd_dmel_chunks() -> None:
    assert 0 < fuzzed(odd_media, 10_000) < 10_000


def odd_call(chance: random.Random) -> object:
    names = (*sampling._PARAMS, "other")
    params = {name: chance.choice(ODD) for name in chance.sample(names, 2)}
    rest = ("num_samples", "prompt_logprobs", "topk_prompt_logprobs", "prompt_logprobs_last_n")
    more = {name: chance.choice(ODD) for name in chance.sample(rest, 2)}
    return sampling.call_from_json({"prompt": {"chunks": []}, "sampling_params": params, **more})


def test_settings_of_odd_json() -> None:
    assert 0 < fuzzed(odd_call, 10_000) < 10_000
