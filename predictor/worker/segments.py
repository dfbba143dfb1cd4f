"""The predictors' shared memory as this lane maps it: inputs are read where they lie, outputs are written where their room was reserved.

Owns the mappings. Never allocates in a segment, and never copies an input of a single request.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
from collections.abc import Mapping

import torch

from contracts.artifact import Signature
from contracts.errors import ExecutionError, InvalidTensor
from contracts.wire import Part, TensorRef
from models.dtypes import TORCH_DTYPES

_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
_ALIGNMENT = 64
"""torch's own allocator aligns so; kernels may add in another order on memory that is not, so such an input is copied."""


class Segments:
    """The mapped segments by number."""

    def __init__(self) -> None:
        self._maps: dict[int, mmap.mmap] = {}

    def map(self, segment: int, fd: int, nbytes: int) -> None:
        """Maps a segment and closes its descriptor. One that cannot be mapped (larger than the address space) fails its own batches and no others."""
        try:
            with contextlib.suppress(OSError, ValueError, OverflowError):
                self._maps[segment] = mmap.mmap(fd, nbytes)
        finally:
            os.close(fd)

    def unmap(self, segment: int) -> None:
        """Forgets a segment; its memory goes with the last tensor that lies in it."""
        self._maps.pop(segment, None)

    def inputs(self, segment: int, parts: tuple[Part, ...], signature: Signature) -> dict[str, torch.Tensor]:
        """Input name -> tensor: the caller's memory for one part, the rows of all parts in their order, padded where they differ, for several."""
        mapped = self._find(segment)
        if len(parts) == 1:
            return {ref.name: _aligned(_tensor(mapped, ref)) for ref in parts[0].inputs}
        joined: dict[str, list[torch.Tensor]] = {}
        for part in parts:
            for ref in part.inputs:
                joined.setdefault(ref.name, []).append(_tensor(mapped, ref))
        pads = {spec.name: spec.pad for spec in signature.inputs}
        return {name: _join(tensors, pads.get(name)) for name, tensors in joined.items()}

    def write(self, segment: int, parts: tuple[Part, ...], outputs: Mapping[str, torch.Tensor], signature: Signature) -> None:
        """Writes each part's rows of the outputs where they were reserved, cut to the part's own length where they are padded.

        ExecutionError names an output that does not fit.
        """
        mapped = self._find(segment)
        rows = sum(part.rows for part in parts)
        padded = {spec.name: [axis for axis, dim in enumerate(spec.shape) if dim in signature.padded] for spec in signature.outputs}
        row = 0
        for part in parts:
            for ref in part.outputs:
                result = outputs.get(ref.name)
                if result is None:
                    raise ExecutionError(f"the model gave no output {ref.name!r}, only {', '.join(outputs)}")
                if len(parts) > 1:
                    if not result.ndim or result.shape[0] != rows:
                        raise ExecutionError(f"output {ref.name!r} has shape {list(result.shape)}, not {rows} rows as its inputs")
                    result = result[row : row + part.rows]
                    for axis in padded.get(ref.name, ()):
                        result = result.narrow(axis, 0, min(ref.shape[axis], result.shape[axis]))
                _write(_tensor(mapped, ref), ref, result)
            row += part.rows

    def _find(self, segment: int) -> mmap.mmap:
        mapped = self._maps.get(segment)
        if mapped is None:
            raise ExecutionError(f"segment {segment} is not mapped: its predictor has gone, or its memory cannot be mapped")
        return mapped


def _tensor(mapped: mmap.mmap, ref: TensorRef) -> torch.Tensor:
    """The tensor that lies at a reference; InvalidTensor if it cannot lie there."""
    dtype = TORCH_DTYPES.get(ref.dtype)
    count = math.prod(ref.shape)
    if dtype is None or count < 0 or ref.nbytes != count * dtype.itemsize or not 0 <= ref.offset <= len(mapped) - ref.nbytes:
        raise InvalidTensor(f"does not lie in its segment of {len(mapped)} bytes", key=ref.name, value=ref)
    if not count:
        return torch.empty(ref.shape, dtype=dtype)
    return torch.frombuffer(mapped, dtype=dtype, count=count, offset=ref.offset).view(ref.shape)


def _join(tensors: list[torch.Tensor], pad: int | None) -> torch.Tensor:
    """All rows as one tensor; what is shorter than the longest is filled with `pad`. Without one, sizes that differ are the model's error."""
    shapes = {tensor.shape[1:] for tensor in tensors}
    if pad is None or len(shapes) == 1:
        return torch.cat(tensors)
    longest = [max(sizes) for sizes in zip(*shapes, strict=True)]
    joined = tensors[0].new_full((sum(len(tensor) for tensor in tensors), *longest), pad)
    row = 0
    for tensor in tensors:
        joined[(slice(row, row + len(tensor)), *map(slice, tensor.shape[1:]))] = tensor
        row += len(tensor)
    return joined


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone() if tensor.data_ptr() % _ALIGNMENT else tensor


def _write(place: torch.Tensor, ref: TensorRef, result: torch.Tensor) -> None:
    if result.shape != place.shape or result.dtype != place.dtype:
        got = f"{_NAMES.get(result.dtype, result.dtype)} {list(result.shape)}"
        raise ExecutionError(f"output {ref.name!r} is {got}, but room was reserved for {ref.dtype} {list(ref.shape)}")
    place.copy_(result)
