"""Packed arrays come back as they were; what does not fit is a TensorError."""

from __future__ import annotations

import numpy as np
import pytest

from cliptune.errors import TensorError
from cliptune.tensors import check_finite, pack, unpack
from cliptune.v1 import tensor_pb2


@pytest.mark.parametrize("dtype", ["float32", "float16", "uint8", "int64", ">f4"])
@pytest.mark.parametrize("shape", [(), (0, 4), (3,), (2, 3, 4)])
def test_an_array_comes_back_as_it_was(dtype: str, shape: tuple[int, ...]) -> None:
    array = np.arange(int(np.prod(shape))).reshape(shape).astype(dtype)
    back = unpack(tensor_pb2.Tensor.FromString(pack(array).SerializeToString()))
    assert back.dtype == np.dtype(dtype).newbyteorder("=")
    np.testing.assert_array_equal(back, array)


def test_a_view_with_strides_is_packed_in_row_major_order() -> None:
    array = np.arange(12, dtype=np.float32).reshape(3, 4).T
    np.testing.assert_array_equal(unpack(pack(array)), array)


@pytest.mark.parametrize(
    "tensor",
    [
        tensor_pb2.Tensor(data=b"1234", shape=[1]),
        tensor_pb2.Tensor(data=b"1234", dtype=99, shape=[1]),
        tensor_pb2.Tensor(data=b"123", dtype=tensor_pb2.DATA_TYPE_FLOAT32, shape=[1]),
        tensor_pb2.Tensor(data=b"1234", dtype=tensor_pb2.DATA_TYPE_FLOAT32, shape=[-1]),
        tensor_pb2.Tensor(data=b"", dtype=tensor_pb2.DATA_TYPE_UINT8, shape=[0, 2**62, 2**62]),
        tensor_pb2.Tensor(data=b"1", dtype=tensor_pb2.DATA_TYPE_UINT8, shape=[1] * 100),
    ],
)
def test_a_tensor_whose_parts_do_not_agree_is_refused(tensor: tensor_pb2.Tensor) -> None:
    with pytest.raises(TensorError):
        unpack(tensor)


def test_a_dtype_that_cannot_travel_is_named() -> None:
    with pytest.raises(TensorError, match="float64"):
        pack(np.zeros(2))


def test_the_place_of_a_nan_is_named() -> None:
    array = np.zeros((2, 3), np.float32)
    check_finite(array)
    array[1, 2] = np.nan
    with pytest.raises(TensorError, match=r"pixels has nan at \[1, 2\]"):
        check_finite(array, "pixels")
