"""Random weights by seed, for load: cheap to make, the same on every machine with any number of threads, and kind to the numbers that flow through.

Owns the initial values only; it knows names and shapes, never architectures.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from models.threads import at_once

_BLOCK = 1 << 20
"""Numbers that one generator makes: few enough to lie in a core's cache, so many that its start costs nothing."""


def fill(module: nn.Module, seed: int) -> None:
    """Gives every parameter and buffer of a module on the meta device its values.

    Matrices and kernels are uniform with variance 1 / fan-in (LeCun et al. 1998); scales and variances lie near 1, shifts near 0, counters are 0.
    """
    with at_once() as start:
        for number, (table, name, tensor) in enumerate(_places(module)):
            values = table[name] = torch.zeros(tensor.shape, dtype=tensor.dtype) if not tensor.is_floating_point() else torch.empty(tensor.shape)
            if tensor.is_floating_point():
                flat = values.view(-1).numpy()
                middle, reach = _spread(name, tensor)
                for block, begin in enumerate(range(0, len(flat), _BLOCK)):
                    start(_draw, flat[begin : begin + _BLOCK], (seed, number, block), middle, reach)


def _places(module: nn.Module) -> Iterator[tuple[dict[str, Tensor | None], str, Tensor]]:
    for owner in module.modules():
        for table in (owner._parameters, owner._buffers):
            for name, tensor in table.items():
                if tensor is not None:
                    yield table, name, tensor  # type: ignore[misc]


def _spread(name: str, like: Tensor) -> tuple[float, float]:
    """The middle of a tensor's values, and how far they reach from it."""
    if like.dim() >= 2:
        return 0.0, math.sqrt(3 / max(1, like[0].numel()))
    return (1.0 if name in ("weight", "running_var") else 0.0), 0.1


def _draw(values: NDArray[np.float32], seeds: tuple[int, ...], middle: float, reach: float) -> None:
    np.random.Generator(np.random.SFC64(seeds)).random(out=values, dtype=np.float32)
    values *= np.float32(2 * reach)
    values += np.float32(middle - reach)
