"""Weights as views of one contiguous buffer.

Owns the mapping from a WeightIndex to tensors. Copies nothing, ever.
"""

from __future__ import annotations

import torch
from torch import Tensor

from contracts.artifact import WeightIndex


def views(buffer: Tensor, index: WeightIndex) -> dict[str, Tensor]:
    """The weights that lie in `buffer` (uint8, 1-D, at least `index.total_bytes`, its start aligned as the index's offsets are), by name."""
    found = {}
    for entry in index.tensors:
        place = buffer[entry.offset : entry.offset + entry.nbytes]
        found[entry.name] = place.view(getattr(torch, entry.dtype)).view(entry.shape)
    return found
