"""Packed arrays: numpy ↔ `cliptune.v1.Tensor` (bytes, dtype, shape).

Both ends of every link use these two functions; nothing else knows the layout. Whether NaN may stand in an
array is the caller's question (`check_finite`): a failed item of a batch is answered with a row of NaN.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from cliptune.errors import TensorError
from cliptune.v1 import tensor_pb2

# On the wire the elements are little-endian, whatever the machine.
_DTYPES: Final[dict[tensor_pb2.DataType.ValueType, np.dtype[Any]]] = {
    tensor_pb2.DATA_TYPE_FLOAT32: np.dtype("<f4"),
    tensor_pb2.DATA_TYPE_FLOAT16: np.dtype("<f2"),
    tensor_pb2.DATA_TYPE_UINT8: np.dtype("u1"),
    tensor_pb2.DATA_TYPE_INT64: np.dtype("<i8"),
}
_CODES: Final = {dtype.newbyteorder("="): code for code, dtype in _DTYPES.items()}
_NAMES: Final = "float32, float16, uint8, int64"


def pack(array: npt.NDArray[Any]) -> tensor_pb2.Tensor:
    """An array of any shape as a message.

    `TensorError` for a dtype other than float32, float16, uint8, int64.
    """
    code = _CODES.get(array.dtype.newbyteorder("="))
    if code is None:
        raise TensorError(
            f"an array of dtype {array.dtype} cannot be sent; allowed: {_NAMES}",
            dtype=array.dtype,
            allowed=_NAMES,
        )
    data = np.ascontiguousarray(array, dtype=_DTYPES[code]).tobytes()
    return tensor_pb2.Tensor(data=data, dtype=code, shape=array.shape)


def unpack(tensor: tensor_pb2.Tensor) -> npt.NDArray[Any]:
    """A message as a read-only array over its bytes.

    `TensorError` when the dtype is unknown or bytes and shape do not agree.
    """
    return view(tensor.data, tensor.dtype, tensor.shape)


def view(
    data: bytes | memoryview, code: tensor_pb2.DataType.ValueType, sides: Sequence[int]
) -> npt.NDArray[Any]:
    """Bytes that lie somewhere else than in their message, as `unpack` makes an array of them."""
    dtype = _DTYPES.get(code)
    if dtype is None:
        raise TensorError(f"a tensor has dtype number {code}; allowed: {_NAMES}", allowed=_NAMES)
    shape = tuple(sides)
    if any(side < 0 for side in shape):
        raise TensorError(f"a tensor has shape {list(shape)}", shape=list(shape))
    wanted_bytes = math.prod(shape) * dtype.itemsize
    if wanted_bytes != len(data):
        raise TensorError(
            f"a tensor of shape {list(shape)} and dtype {dtype.name} has {wanted_bytes} bytes, "
            f"not {len(data)}",
            shape=list(shape),
            bytes=len(data),
        )
    try:
        array = np.frombuffer(data, dtype=dtype).reshape(shape)
    except ValueError as error:  # more dimensions than numpy has, or an empty one beside a huge one
        raise TensorError(f"a tensor of shape {list(shape)}: {error}", shape=list(shape)) from None
    return array.astype(dtype.newbyteorder("="), copy=False)


def check_finite(array: npt.NDArray[Any], what: str = "tensor") -> None:
    """`TensorError` naming the first NaN or infinity; `what` is the array's name in the message."""
    if array.dtype.kind != "f" or bool(np.isfinite(array).all()):
        return
    place = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
    raise TensorError(f"{what} has {array[place]} at {list(place)}", index=list(place))
