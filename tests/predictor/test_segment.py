"""The predictor's shared memory: extents never overlap, everything comes back, and nobody can resize it."""

import fcntl
import mmap
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contracts.artifact import TensorSpec
from predictor.segment import ALIGNMENT, Segment, place

X = TensorSpec("x", "FP32", ("batch", 3))
Y = TensorSpec("y", "FP32", ("batch", 5))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 3000)), max_size=60))
def test_extents_never_overlap_and_all_of_it_comes_back(steps: list[tuple[bool, int]]) -> None:
    segment = Segment(16384)
    extents: dict[int, int] = {}
    for allocate, number in steps:
        if allocate:
            offset = segment.allocate(number)
            if offset is None:
                need = -(-max(number, 1) // ALIGNMENT) * ALIGNMENT
                taken = sorted(extents.items())
                gaps = [start - end for end, start in zip([0, *(at + size for at, size in taken)], [*(at for at, _ in taken), 16384], strict=True)]
                assert max(gaps) < need, "there was room"
                continue
            size = -(-max(number, 1) // ALIGNMENT) * ALIGNMENT
            assert offset % ALIGNMENT == 0
            assert offset + size <= 16384
            assert all(offset + size <= other or other + length <= offset for other, length in extents.items())
            extents[offset] = size
        elif extents:
            offset = list(extents)[number % len(extents)]
            segment.free(offset)
            del extents[offset]
        assert segment.used_bytes == sum(extents.values())
    for offset in extents:
        segment.free(offset)
    assert segment.used_bytes == 0
    assert segment.allocate(16384) == 0
    segment.close()


def test_an_extent_cannot_be_freed_twice() -> None:
    segment = Segment(4096)
    offset = segment.allocate(100)
    assert offset is not None
    segment.free(offset)
    with pytest.raises(KeyError):
        segment.free(offset)


def test_no_peer_can_cut_it_short() -> None:
    segment = Segment(4096)
    assert fcntl.fcntl(segment.fd, fcntl.F_GET_SEALS) & (fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW) == fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
    with pytest.raises(PermissionError):
        os.ftruncate(segment.fd, 0)


def test_inputs_lie_where_their_references_say_and_move_with_them() -> None:
    segment = Segment(4096)
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    placement = place(segment, [(X, x)], [(Y, (2, 5), 40)])
    assert placement is not None
    peer = mmap.mmap(segment.fd, 4096)
    (ref,) = placement.inputs
    assert np.array_equal(np.frombuffer(peer, np.float32, 6, ref.offset).reshape(ref.shape), x)
    other = Segment(4096)
    assert other.allocate(640) == 0
    assert placement.move(other)
    assert placement.segment is other
    assert np.array_equal(other.view(placement.inputs[0], np.dtype(np.float32)), x)
    (out,) = placement.outputs
    assert (out.shape, out.nbytes) == ((2, 5), 40)
    assert out.offset >= placement.inputs[0].offset + placement.inputs[0].nbytes


def test_what_does_not_fit_is_not_placed() -> None:
    segment = Segment(4096)
    assert place(segment, [(X, np.zeros((400, 3), np.float32))], []) is None
    assert segment.used_bytes == 0
