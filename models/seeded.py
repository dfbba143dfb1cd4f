"""Random weights by seed, for load: cheap to make, the same on every machine, and kind to the numbers that flow through.

Owns the initial values only; it knows names and shapes, never architectures.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def fill(module: nn.Module, seed: int) -> None:
    """Gives every parameter and buffer of a module on the meta device its values.

    Matrices and kernels are uniform with variance 1 / fan-in (LeCun et al. 1998); scales and variances lie near 1, shifts near 0, counters are 0.
    """
    generator = torch.Generator().manual_seed(seed)
    for owner in module.modules():
        for table in (owner._parameters, owner._buffers):
            for name, tensor in table.items():
                if tensor is not None:
                    table[name] = _values(name, tensor, generator)  # type: ignore[assignment]


def _values(name: str, like: Tensor, generator: torch.Generator) -> Tensor:
    values = torch.empty(like.shape, dtype=like.dtype, device="cpu")
    if not values.is_floating_point():
        return values.zero_()
    if values.dim() >= 2:
        bound = math.sqrt(3 / max(1, values[0].numel()))
        return values.uniform_(-bound, bound, generator=generator)
    middle = 1.0 if name in ("weight", "running_var") else 0.0
    return values.uniform_(middle - 0.1, middle + 0.1, generator=generator)
