"""Random weights by seed, for load: cheap to make, the same on every machine, and kind to the numbers that flow through.

Owns the initial values only; it knows names and shapes, never architectures.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn


def fill(module: nn.Module, seed: int) -> None:
    """Gives every parameter and buffer of a module on the meta device its values.

    Matrices and kernels are uniform with variance 1 / fan-in (LeCun et al. 1998); scales and variances lie near 1, shifts near 0, counters are 0.
    """
    generator = np.random.Generator(np.random.SFC64(seed))
    for owner in module.modules():
        for table in (owner._parameters, owner._buffers):
            for name, tensor in table.items():
                if tensor is not None:
                    table[name] = _values(name, tensor, generator)  # type: ignore[assignment]


def _values(name: str, like: Tensor, generator: np.random.Generator) -> Tensor:
    if not like.is_floating_point():
        return torch.zeros(like.shape, dtype=like.dtype)
    middle, reach = (1.0 if name in ("weight", "running_var") else 0.0), 0.1
    if like.dim() >= 2:
        middle, reach = 0.0, math.sqrt(3 / max(1, like[0].numel()))
    uniform = torch.from_numpy(generator.random(tuple(like.shape), dtype=np.float32))
    return uniform.mul_(2 * reach).add_(middle - reach)
