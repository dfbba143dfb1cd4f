"""The exported programs that the tests of the protocols serve. Imports torch; the clients do not."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from tests.protocol.outside.expected import DATATYPES


class Several(nn.Module):
    """Two inputs of different datatypes, three outputs of three."""

    def forward(self, left: Tensor, right: Tensor) -> dict[str, Tensor]:
        """FP32 [batch, 4] and INT64 [batch, 4]."""
        return {"sum": left + right, "double": right * 2, "positive": left > 0}


class Datatypes(nn.Module):
    """Gives back one tensor of every datatype."""

    def forward(
        self,
        x_bool: Tensor,
        x_uint8: Tensor,
        x_uint16: Tensor,
        x_uint32: Tensor,
        x_uint64: Tensor,
        x_int8: Tensor,
        x_int16: Tensor,
        x_int32: Tensor,
        x_int64: Tensor,
        x_fp16: Tensor,
        x_bf16: Tensor,
        x_fp32: Tensor,
        x_fp64: Tensor,
    ) -> tuple[Tensor, ...]:
        """[batch, 3] each."""
        unsigned, signed = (x_bool, x_uint8, x_uint16, x_uint32, x_uint64), (x_int8, x_int16, x_int32, x_int64)
        return tuple(tensor.clone() for tensor in (*unsigned, *signed, x_fp16, x_bf16, x_fp32, x_fp64))


_TORCH = {"BOOL": torch.bool, "FP16": torch.float16, "BF16": torch.bfloat16, "FP32": torch.float32, "FP64": torch.float64}


def export(folder: Path) -> dict[str, Path]:
    """Writes them; name -> program."""
    examples = {
        "several": (Several(), {"left": torch.rand(2, 4), "right": torch.ones(2, 4, dtype=torch.int64)}),
        "datatypes": (Datatypes(), {f"x_{name.lower()}": torch.zeros(2, 3, dtype=_torch(name)) for name in DATATYPES}),
    }
    batch = torch.export.Dim("batch", max=1024)
    for name, (model, inputs) in examples.items():
        program = torch.export.export(model, (), inputs, dynamic_shapes={key: {0: batch} for key in inputs})
        torch.export.save(program, folder / f"{name}.pt2")
    return {name: folder / f"{name}.pt2" for name in examples}


def _torch(name: str) -> torch.dtype:
    return _TORCH.get(name) or getattr(torch, name.lower())
