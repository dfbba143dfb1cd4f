"""The predictor's shared memory: a memfd that agent and lanes map, and who has which part of it.

Owns the memory and its extents. It has no name, so nothing is left when the processes that map it have ended. Its size is sealed: no peer can cut it
short under another's mapping. Knows nothing of requests or batches.
"""

from __future__ import annotations

import bisect
import fcntl
import mmap
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from contracts.artifact import TensorSpec
from contracts.wire import TensorRef

ALIGNMENT = 64
"""Bytes; a cache line, and what vector instructions like best."""

Array = npt.NDArray[np.generic]


class Segment:
    """`nbytes` of shared memory with a first-fit extent allocator; freed neighbours grow together again."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.used_bytes = 0
        self.fd = os.memfd_create("sluice-segment", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.fd, nbytes)
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        self._map = mmap.mmap(self.fd, nbytes)
        self._free: list[tuple[int, int]] = [(0, nbytes)]
        self._taken: dict[int, int] = {}

    def allocate(self, nbytes: int) -> int | None:
        """The offset of a fresh extent of at least `nbytes`; None when there is no room."""
        need = align(max(nbytes, 1))
        for at, (offset, size) in enumerate(self._free):
            if size >= need:
                if size == need:
                    del self._free[at]
                else:
                    self._free[at] = (offset + need, size - need)
                self._taken[offset] = need
                self.used_bytes += need
                return offset
        return None

    def free(self, offset: int) -> None:
        """Gives an extent back; KeyError if there is none at `offset`."""
        size = self._taken.pop(offset)
        self.used_bytes -= size
        at = bisect.bisect(self._free, (offset, 0))
        if at < len(self._free) and self._free[at][0] == offset + size:
            size += self._free.pop(at)[1]
        if at and sum(self._free[at - 1]) == offset:
            at -= 1
            offset, size = self._free[at][0], self._free[at][1] + size
            self._free[at] = (offset, size)
        else:
            self._free.insert(at, (offset, size))

    def view(self, ref: TensorRef, dtype: np.dtype[np.generic]) -> Array:
        """The tensor at `ref`, without a copy; valid until its extent is freed."""
        return np.frombuffer(self._map, dtype, count=ref.nbytes // dtype.itemsize, offset=ref.offset).reshape(ref.shape)

    def copy_within(self, source: Segment, source_offset: int, offset: int, nbytes: int) -> None:
        """Copies bytes of another segment to here."""
        self._map[offset : offset + nbytes] = source._map[source_offset : source_offset + nbytes]

    def write(self, offset: int, array: Array) -> None:
        """Copies a C-contiguous array to `offset`."""
        if array.nbytes:
            np.frombuffer(self._map, array.dtype, count=array.size, offset=offset)[:] = array.reshape(-1)

    def close(self) -> None:
        """Closes the descriptor. The mapping goes with the last view of it."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


@dataclass(slots=True)
class Placement:
    """Where one request's inputs lie and its outputs will: one extent of `nbytes`, the inputs in its first `input_bytes`."""

    segment: Segment
    offset: int
    input_bytes: int
    nbytes: int
    inputs: tuple[TensorRef, ...]
    outputs: tuple[TensorRef, ...]

    def move(self, segment: Segment) -> bool:
        """Copies the inputs to another segment and reserves room for the outputs there; False when it has none."""
        offset = segment.allocate(self.nbytes)
        if offset is None:
            return False
        segment.copy_within(self.segment, self.offset, offset, self.input_bytes)
        by = offset - self.offset
        self.inputs = tuple(_shifted(ref, by) for ref in self.inputs)
        self.outputs = tuple(_shifted(ref, by) for ref in self.outputs)
        self.segment, self.offset = segment, offset
        return True


def place(
    segment: Segment, inputs: Iterable[tuple[TensorSpec, Array]], outputs: Sequence[tuple[TensorSpec, tuple[int, ...], int]]
) -> Placement | None:
    """Copies inputs into the segment and reserves room for outputs (spec, shape, bytes); None when it has no room."""
    end = 0
    ins: list[tuple[TensorSpec, Array, int]] = []
    for spec, array in inputs:
        ins.append((spec, array, end))
        end += align(array.nbytes)
    input_bytes = end
    total = end + sum(align(nbytes) for _, _, nbytes in outputs)
    base = segment.allocate(total)
    if base is None:
        return None
    for _, array, at in ins:
        segment.write(base + at, array)
    outs = []
    for spec, shape, nbytes in outputs:
        outs.append(TensorRef(spec.name, spec.dtype, shape, base + end, nbytes))
        end += align(nbytes)
    refs = tuple(TensorRef(spec.name, spec.dtype, array.shape, base + at, array.nbytes) for spec, array, at in ins)
    return Placement(segment, base, input_bytes, total, refs, tuple(outs))


def align(nbytes: int) -> int:
    """`nbytes` rounded up to the alignment."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _shifted(ref: TensorRef, by: int) -> TensorRef:
    return TensorRef(ref.name, ref.dtype, ref.shape, ref.offset + by, ref.nbytes)
