from __future__ import annotations

import math
import os

import pytest
import torch

from contracts.artifact import DTYPE_BYTES, Signature, TensorSpec
from contracts.errors import ExecutionError, InvalidTensor
from contracts.wire import Part, TensorRef
from predictor.worker.segments import Segments

PLAIN = Signature((), ())


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
    x = segments.inputs(1, (Part(2, (ref("x", dtype, (2, 3), 64),), ()),), PLAIN)["x"]
    assert x.shape == (2, 3)
    assert x.element_size() == width
    assert bytes(x.view(torch.uint8).flatten().tolist()) == b"\1" * 6 * width


def test_an_aligned_input_is_the_callers_memory_and_an_unaligned_one_a_copy() -> None:
    segments = segments_of(bytes(4096))
    part = Part(1, (ref("aligned", "FP32", (1, 4), 128), ref("unaligned", "FP32", (1, 4), 132)), ())
    first, second = segments.inputs(1, (part,), PLAIN), segments.inputs(1, (part,), PLAIN)
    assert first["aligned"].data_ptr() == second["aligned"].data_ptr()
    first["aligned"].fill_(3)
    assert second["aligned"].tolist() == [[3, 3, 3, 3]]
    assert first["unaligned"].data_ptr() % 64 == 0
    assert segments.inputs(1, (part,), PLAIN)["unaligned"].tolist() == [[3, 3, 3, 0]]


def test_parts_are_joined_in_their_order_whatever_the_order_of_their_tensors() -> None:
    segments = segments_of(bytes(range(64)))
    parts = (
        Part(1, (ref("a", "UINT8", (1, 2), 0), ref("b", "UINT8", (1, 1), 2)), ()),
        Part(2, (ref("b", "UINT8", (2, 1), 3), ref("a", "UINT8", (2, 2), 5)), ()),
    )
    found = segments.inputs(1, parts, PLAIN)
    assert found["a"].tolist() == [[0, 1], [5, 6], [7, 8]]
    assert found["b"].tolist() == [[2], [3], [4]]


def test_a_tensor_without_elements_is_no_error() -> None:
    segments = segments_of(bytes(64))
    assert segments.inputs(1, (Part(1, (ref("x", "FP32", (1, 0), 64),), ()),), PLAIN)["x"].shape == (1, 0)


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
        segments_of(bytes(64)).inputs(1, (Part(1, (bad,), ()),), PLAIN)


def test_outputs_must_have_the_rows_of_their_batch() -> None:
    segments = segments_of(bytes(64))
    parts = tuple(Part(1, (), (ref("y", "FP32", (1, 2), offset),)) for offset in (0, 8))
    segments.write(1, parts, {"y": torch.tensor([[1.0, 2.0], [3.0, 4.0]])}, PLAIN)
    written = segments.inputs(1, (Part(2, (ref("y", "FP32", (2, 2), 0),), ()),), PLAIN)["y"]
    assert written.tolist() == [[1, 2], [3, 4]]
    with pytest.raises(ExecutionError, match=r"output 'y' has shape \[3, 2\], not 2 rows"):
        segments.write(1, parts, {"y": torch.zeros(3, 2)}, PLAIN)


def test_a_segment_that_was_unmapped_lives_as_long_as_a_tensor_in_it() -> None:
    segments = segments_of(b"\7" * 64)
    part = Part(1, (ref("x", "UINT8", (1, 8), 0),), ())
    held = segments.inputs(1, (part,), PLAIN)["x"]
    segments.unmap(1)
    segments.unmap(1)
    assert held.tolist() == [[7] * 8]
    with pytest.raises(ExecutionError, match="segment 1 is not mapped"):
        segments.inputs(1, (part,), PLAIN)


PADDED = Signature(
    inputs=(
        TensorSpec("ids", "INT64", ("batch", "seq"), pad=9),
        TensorSpec("mask", "BOOL", ("batch", "seq"), pad=0),
        TensorSpec("k", "UINT8", ("batch",)),
    ),
    outputs=(TensorSpec("states", "INT64", ("batch", "seq", 2)), TensorSpec("sum", "INT64", ("batch",))),
    padded=("seq",),
)


def test_shorter_parts_are_filled_with_what_the_model_says_and_get_their_own_length_back() -> None:
    segments = segments_of(bytes(512))
    places = (
        (ref("states", "INT64", (1, 2, 2), 256), ref("sum", "INT64", (1,), 320)),
        (ref("states", "INT64", (2, 3, 2), 328), ref("sum", "INT64", (2,), 432)),
    )
    parts = (
        Part(1, (ref("ids", "INT64", (1, 2), 0), ref("mask", "BOOL", (1, 2), 16), ref("k", "UINT8", (1,), 18)), places[0]),
        Part(2, (ref("ids", "INT64", (2, 3), 64), ref("mask", "BOOL", (2, 3), 112), ref("k", "UINT8", (2,), 120)), places[1]),
    )
    found = segments.inputs(1, parts, PADDED)
    assert found["ids"].tolist() == [[0, 0, 9], [0, 0, 0], [0, 0, 0]]
    assert found["mask"].dtype == torch.bool
    assert found["mask"].tolist() == [[False] * 3] * 3
    assert found["k"].shape == (3,)
    states = torch.arange(18).view(3, 3, 2)
    segments.write(1, parts, {"states": states, "sum": torch.tensor([1, 2, 3])}, PADDED)
    written = [segments.inputs(1, (Part(part.rows, part.outputs, ()),), PLAIN) for part in parts]
    assert written[0]["states"].tolist() == states[:1, :2].tolist()
    assert written[1]["states"].tolist() == states[1:].tolist()
    assert [part["sum"].tolist() for part in written] == [[1], [2, 3]]


def test_sizes_that_differ_where_nothing_is_padded_are_no_batch() -> None:
    segments = segments_of(bytes(64))
    parts = (Part(1, (ref("k", "UINT8", (1, 2), 0),), ()), Part(1, (ref("k", "UINT8", (1, 3), 8),), ()))
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        segments.inputs(1, parts, PADDED)


@pytest.mark.parametrize("dtype", DTYPE_BYTES)
def test_parts_of_every_datatype_join_and_are_padded(dtype: str) -> None:
    segments = segments_of(b"\1" * 256)
    parts = (Part(1, (ref("x", dtype, (1, 1), 0),), ()), Part(1, (ref("x", dtype, (1, 2), 64),), ()))
    signature = Signature((TensorSpec("x", dtype, ("batch", "n"), pad=1),), (), padded=("n",))
    x = segments.inputs(1, parts, signature)["x"]
    assert x.shape == (2, 2)
    assert x[0, 1].item() == 1
    same = segments.inputs(1, (parts[0], parts[0]), signature)["x"]
    assert same.view(torch.uint8).tolist() == [[1] * DTYPE_BYTES[dtype]] * 2
