"""Tensors of the wire, dense or sparse, to arrays and back.

Shape letters: N positions of a datum, K targets of a position.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from plait.errors import DataError
from plait.service.wire import tinker_pb2 as pb
from plait.types import TensorData

_READ: dict[int, np.dtype[Any]] = {
    pb.DTYPE_FLOAT32: np.dtype("<f4"),
    pb.DTYPE_INT64: np.dtype("<i8"),
    pb.DTYPE_INT32: np.dtype("<i4"),
    pb.DTYPE_BFLOAT16: np.dtype("<u2"),
}
MOST_VALUES = 1 << 26
"""Of one tensor, and of all sparse ones of a request: a sparse one may say any shape."""

_MOST_DIMENSIONS = 8


def tensor_of(name: str, message: pb.Tensor) -> TensorData:
    """
    Raises:
        DataError: its bytes are not those of its dtype and shape.
    """
    kind = _READ.get(message.dtype)
    if kind is None:
        raise DataError(
            f"{name}: a tensor's dtype is float32, int64, int32 or bfloat16; it is {message.dtype}"
        )
    shape = tuple(message.shape[: _MOST_DIMENSIONS + 1])
    if len(shape) > _MOST_DIMENSIONS:
        raise DataError(f"{name}: a tensor has up to {_MOST_DIMENSIONS} dimensions; it has more")
    sizes = all(0 <= size <= MOST_VALUES for size in shape)
    if not sizes or math.prod(shape) > MOST_VALUES:
        raise DataError(f"{name}: a tensor has up to {MOST_VALUES} values; its shape is {shape}")
    if message.HasField("sparse_csr"):
        values = _sparse(name, message.sparse_csr, kind, shape)
    else:
        values = _from_bytes(name, message.dense, kind)
        if message.shape and values.size != np.prod(shape, dtype=np.int64):
            raise DataError(f"{name}: shape {shape} has other than its {values.size} values")
        values = values.reshape(shape) if message.shape else values
    if message.dtype == pb.DTYPE_BFLOAT16:  # the upper half of a float32
        values = (values.astype(np.uint32) << 16).view(np.float32)
    return TensorData(values, "float32" if values.dtype.kind == "f" else "int64")


def sparse_values(message: pb.Tensor) -> int:
    """Values that it will have when it is dense; 0 where it is so already."""
    shape = message.shape[: _MOST_DIMENSIONS + 1]
    sparse = message.HasField("sparse_csr")
    return math.prod(max(size, 0) for size in shape) if sparse else 0


def _from_bytes(name: str, data: bytes, kind: "np.dtype[Any]") -> NDArray[Any]:
    if len(data) % kind.itemsize:
        raise DataError(f"{name}: {len(data)} bytes are no whole number of {kind.name} values")
    return np.frombuffer(data, kind)


def _sparse(
    name: str, csr: pb.SparseCsr, kind: "np.dtype[Any]", shape: Sequence[int]
) -> NDArray[Any]:
    """(N, K) from compressed rows; what is not listed is 0."""
    values = _from_bytes(name, csr.values, kind)
    crow = _from_bytes(name, csr.crow_indices, np.dtype("<i8")).astype(np.int64)
    columns = _from_bytes(name, csr.col_indices, np.dtype("<i8")).astype(np.int64)
    whole = (
        len(shape) == 2
        and len(crow) == shape[0] + 1
        and len(values) == len(columns)
        and crow[0] == 0
        and crow[-1] == len(values)
        and bool((np.diff(crow) >= 0).all())
        and bool(((columns >= 0) & (columns < shape[1])).all())
    )
    if not whole:
        raise DataError(
            f"{name}: compressed rows of shape {tuple(shape)} need {len(shape) and shape[0]} + 1 "
            "rising row pointers from 0 to the number of values, and columns inside the shape"
        )
    dense = np.zeros(tuple(shape), values.dtype)
    dense[np.repeat(np.arange(shape[0]), np.diff(crow)), columns] = values
    return dense


def tensor_to(values: NDArray[Any]) -> pb.Tensor:
    """A dense message; whole numbers as int64, others as float32."""
    whole = values.dtype.kind in "iu"
    array = values.astype("<i8" if whole else "<f4")
    dtype = pb.DTYPE_INT64 if whole else pb.DTYPE_FLOAT32
    return pb.Tensor(dense=array.tobytes(), dtype=dtype, shape=array.shape)


def batched(arrays: Sequence[NDArray[Any]]) -> pb.BatchedTensor:
    """Arrays (N, ...) of one trailing shape, one behind another; offsets are bytes."""
    flat = [np.ascontiguousarray(array, "<f4") for array in arrays]
    ends = np.cumsum([0, *(array.nbytes for array in flat)], dtype="<i8")
    return pb.BatchedTensor(
        data=b"".join(array.tobytes() for array in flat),
        offsets=ends.tobytes(),
        dtype=pb.DTYPE_FLOAT32,
        trailing_shape=flat[0].shape[1:] if flat else (),
    )


def unbatched(message: pb.BatchedTensor) -> list[NDArray[Any]]:
    """The arrays that `batched` took."""
    values = np.frombuffer(message.data, _READ[message.dtype])
    ends = np.frombuffer(message.offsets, "<i8") // values.itemsize
    trailing = tuple(message.trailing_shape)
    return [values[start:stop].reshape(-1, *trailing) for start, stop in pairwise(ends)]
