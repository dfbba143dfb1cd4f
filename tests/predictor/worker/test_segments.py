from __future__ import annotations

import math
import os

import pytest
import torch

from contracts.artifact import DTYPE_BYTES
from contracts.errors import ExecutionError, InvalidTensor
from contracts.wire import Part, TensorRef
from predictor.worker.segments import Segments


def segments_of(content: bytes) -> Segments:
    fd = os.memfd_create("segment")
    os.write(fd, content)
    segments = Segments()
    segments.map(1, fd, len(content))
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.close(fd)
    return segments


def ref(name: str, dtype: str, shape: tuple[int, ...], offset: int) -> TensorRef:
    return TensorRef(name, dtype, shape, offset, math.prod(shape) * DTYPE_BYTES[dtype])


@pytest.mark.parametrize("dtype", DTYPE_BYTES)
def test_every_datatype_of_the_protocol_is_read_where_it_lies(dtype: str) -> None:
    width = DTYPE_BYTES[dtype]
    segments = segments_of(bytes(64) + b"\1" * 6 * width)
    x = segments.inputs(1, (Part(2, (ref("x", dtype, (2, 3), 64),), ()),))["x"]
    assert x.shape == (2, 3)
    assert x.element_size() == width
    assert bytes(x.view(torch.uint8).flatten().tolist()) == b"\1" * 6 * width


def test_an_aligned_input_is_the_callers_memory_and_an_unaligned_one_a_copy() -> None:
    segments = segments_of(bytes(4096))
    part = Part(1, (ref("aligned", "FP32", (1, 4), 128), ref("unaligned", "FP32", (1, 4), 132)), ())
    first, second = segments.inputs(1, (part,)), segments.inputs(1, (part,))
    assert first["aligned"].data_ptr() == second["aligned"].data_ptr()
    first["aligned"].fill_(3)
    assert second["aligned"].tolist() == [[3, 3, 3, 3]]
    assert first["unaligned"].data_ptr() % 64 == 0
    assert segments.inputs(1, (part,))["unaligned"].tolist() == [[3, 3, 3, 0]]


def test_parts_are_joined_in_their_order_whatever_the_order_of_their_tensors() -> None:
    segments = segments_of(bytes(range(64)))
    parts = (
        Part(1, (ref("a", "UINT8", (1, 2), 0), ref("b", "UINT8", (1, 1), 2)), ()),
        Part(2, (ref("b", "UINT8", (2, 1), 3), ref("a", "UINT8", (2, 2), 5)), ()),
    )
    found = segments.inputs(1, parts)
    assert found["a"].tolist() == [[0, 1], [5, 6], [7, 8]]
    assert found["b"].tolist() == [[2], [3], [4]]


def test_a_tensor_without_elements_is_no_error() -> None:
    segments = segments_of(bytes(64))
    assert segments.inputs(1, (Part(1, (ref("x", "FP32", (1, 0), 64),), ()),))["x"].shape == (1, 0)


BAD_REFS = {
    "past the end": TensorRef("x", "FP32", (1, 4), 56, 16),
    "before the start": TensorRef("x", "FP32", (1, 4), -4, 16),
    "fewer bytes than its shape takes": TensorRef("x", "FP32", (1, 4), 0, 8),
    "a negative size": TensorRef("x", "FP32", (1, -4), 0, -16),
    "an unknown datatype": TensorRef("x", "BYTES", (1, 4), 0, 16),
}


@pytest.mark.parametrize("bad", BAD_REFS.values(), ids=BAD_REFS)
def test_a_reference_outside_its_segment_is_named(bad: TensorRef) -> None:
    with pytest.raises(InvalidTensor, match="x: does not lie in its segment of 64 bytes"):
        segments_of(bytes(64)).inputs(1, (Part(1, (bad,), ()),))


def test_outputs_must_have_the_rows_of_their_batch() -> None:
    segments = segments_of(bytes(64))
    parts = tuple(Part(1, (), (ref("y", "FP32", (1, 2), offset),)) for offset in (0, 8))
    segments.write(1, parts, {"y": torch.tensor([[1.0, 2.0], [3.0, 4.0]])})
    written = segments.inputs(1, (Part(2, (ref("y", "FP32", (2, 2), 0),), ()),))["y"]
    assert written.tolist() == [[1, 2], [3, 4]]
    with pytest.raises(ExecutionError, match=r"output 'y' has shape \[3, 2\], not 2 rows"):
        segments.write(1, parts, {"y": torch.zeros(3, 2)})


def test_a_segment_that_was_unmapped_lives_as_long_as_a_tensor_in_it() -> None:
    segments = segments_of(b"\7" * 64)
    part = Part(1, (ref("x", "UINT8", (1, 8), 0),), ())
    held = segments.inputs(1, (part,))["x"]
    segments.unmap(1)
    segments.unmap(1)
    assert held.tolist() == [[7] * 8]
    with pytest.raises(ExecutionError, match="segment 1 is not mapped"):
        segments.inputs(1, (part,))
