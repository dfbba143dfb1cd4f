"""The models of the protocol benchmark, as exported programs, and the documents that declare them.

`identity` gives back what it gets, so that a request costs only its way. `scale` multiplies by weights of its own: each answer shows which function
gave it, and whether its weights were there, bit for bit whatever batch it ran in.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks.protocol_parts.messages import INPUT, OUTPUT

_MOST_ROWS = 4096
_MOST_VALUES = 1 << 20
_DOCUMENT = """\
apiVersion: serving.kserve.io/v1beta1
kind: InferenceService
metadata:
  name: {name}
  annotations: {{sluice.dev/max-batch: "32", sluice.dev/quota-percent: "{quota}", sluice.dev/slo-latency-ms: "2000"}}
spec: {{predictor: {{model: {{runtime: sluice, modelFormat: {{name: torch-export}}, storageUri: "file://{path}"}}}}}}
---
"""


class _Identity(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {OUTPUT: x.clone()}


class _Scale(nn.Module):
    def __init__(self, factors: NDArray[np.float32]) -> None:
        super().__init__()
        self.factors = nn.Parameter(torch.from_numpy(factors))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {OUTPUT: x * self.factors}


def factors(seed: int, width: int) -> NDArray[np.float32]:
    """The weights of the scaling model with this seed."""
    return np.random.default_rng(seed).standard_normal(width, dtype=np.float32)


def export_identity(path: Path) -> None:
    """Writes the identity of FP32 [batch, values]."""
    _export(_Identity(), torch.rand(2, 4), {0: torch.export.Dim("batch", max=_MOST_ROWS), 1: torch.export.Dim("values", max=_MOST_VALUES)}, path)


def export_scale(path: Path, seed: int, width: int) -> None:
    """Writes a scaling of FP32 [batch, width]."""
    _export(_Scale(factors(seed, width)), torch.rand(2, width), {0: torch.export.Dim("batch", max=_MOST_ROWS)}, path)


def _export(model: nn.Module, example: Tensor, dims: dict[int, object], path: Path) -> None:
    torch.export.save(torch.export.export(model.eval(), (example,), dynamic_shapes={INPUT: dims}), path)


def document(name: str, path: Path, quota_percent: float = 5) -> str:
    """The InferenceService of an exported program."""
    return _DOCUMENT.format(name=name, path=path, quota=quota_percent)
