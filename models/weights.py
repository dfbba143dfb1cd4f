"""Weights as views of one contiguous buffer.

Owns the mapping from a WeightIndex to tensors. Copies nothing, ever.
"""

from __future__ import annotations

import torch
from torch import Tensor

from contracts.artifact import WeightIndex

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}


def views(buffer: Tensor, index: WeightIndex) -> dict[str, Tensor]:
    """The weights that lie in `buffer` (uint8, 1-D, at least `index.total_bytes`, its start aligned as the index's offsets are), by name."""
    typed: dict[str, Tensor] = {}
    found = {}
    for entry in index.tensors:
        if (flat := typed.get(entry.dtype)) is None:
            flat = typed[entry.dtype] = buffer[: index.total_bytes].view(_DTYPES[entry.dtype])
        found[entry.name] = flat.as_strided(entry.shape, _strides(entry.shape), flat.storage_offset() + entry.offset // flat.itemsize)
    return found


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))
