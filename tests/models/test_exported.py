"""The interpreter of exported programs, held against torch's own way to run them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from contracts.errors import InvalidTensor
from contracts.functions import ModelFormat, ModelRef
from models.load import load


class Mixed(nn.Module):
    """Convolution, pooling, attention, indexing, several results of one call, sizes computed from the input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 16, 3, padding=1)
        self.encoder = nn.TransformerEncoderLayer(16, 4, 32, activation="gelu", batch_first=True, norm_first=True)
        self.norm = nn.LayerNorm(16)
        self.table = nn.Embedding(10, 16)

    def forward(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Signals [batch, 4, time] and ids [batch, time] -> [batch, time, 16] and the positions of the greatest, [batch, time]."""
        batch, _, time = x.shape
        hidden = self.norm(self.conv(x).transpose(1, 2).contiguous()) + self.table(ids)
        hidden = hidden + torch.arange(time, device=x.device, dtype=x.dtype).view(1, time, 1) / time
        hidden = self.encoder(hidden)
        first, second = hidden.chunk(2, dim=-1)
        values, positions = torch.cat((second, first), -1).topk(3, dim=-1)
        hidden = hidden.masked_fill(hidden < -1, 0.5) + values.mean(-1, keepdim=True)
        return hidden, positions[..., 0].view(batch, time)


@pytest.mark.parametrize("decomposed", [False, True], ids=["as exported", "decomposed to core operators"])
def test_a_program_gives_what_torch_gives_bit_for_bit(decomposed: bool, tmp_path: Path) -> None:
    torch.manual_seed(1)
    batch, time = torch.export.Dim("batch"), torch.export.Dim("time", min=2, max=64)
    inputs = (torch.randn(2, 4, 6), torch.randint(0, 10, (2, 6)))
    program = torch.export.export(Mixed().eval(), inputs, dynamic_shapes=({0: batch, 2: time}, {0: batch, 1: time}))
    program = program.run_decompositions() if decomposed else program
    torch.export.save(program, tmp_path / "mixed.pt2")
    loaded = load(ModelRef(ModelFormat.TORCH_EXPORT, str(tmp_path / "mixed.pt2")))
    assert [spec.shape[0] for spec in loaded.signature.inputs + loaded.signature.outputs] == ["batch"] * 4
    for rows, length in ((1, 2), (2, 6), (5, 33)):
        x, ids = torch.randn(rows, 4, length), torch.randint(0, 10, (rows, length))
        with torch.inference_mode():
            expected = program.module()(x, ids)
        found = loaded.run({"x": x, "ids": ids})
        assert all(torch.equal(one, other) for one, other in zip(expected, found.values(), strict=True))


def test_a_program_without_a_free_size_is_served_one_request_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "fixed.pt2"
    torch.export.save(torch.export.export(nn.Linear(4, 2), (torch.rand(3, 4),)), path)
    loaded = load(ModelRef(ModelFormat.TORCH_EXPORT, str(tmp_path)))
    assert not loaded.signature.batchable
    assert loaded.signature.inputs[0].shape == (3, 4)
    assert [spec.name for spec in loaded.signature.outputs] == ["output"]


class Looked(nn.Module):
    """Two tables, one of them indexed by values that only the run knows."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.kinds = nn.Embedding(10, 4), nn.Embedding(3, 4)

    def forward(self, ids: Tensor, scores: Tensor) -> Tensor:
        """Ids [batch, 5] and scores [batch, 5, 3] -> [batch, 4]."""
        return self.words(ids.view(-1, 5).to(torch.int64)).sum(1) + self.kinds(scores.argmax(-1)).sum(1)


@pytest.mark.parametrize("decomposed", [False, True], ids=["as exported", "decomposed to core operators"])
def test_an_index_outside_its_table_is_found_without_a_run(decomposed: bool, tmp_path: Path) -> None:
    inputs = (torch.zeros(2, 5, dtype=torch.int32), torch.randn(2, 5, 3))
    batch = torch.export.Dim("batch", min=1, max=8)
    program = torch.export.export(Looked().eval(), inputs, dynamic_shapes=({0: batch}, {0: batch}))
    torch.export.save(program.run_decompositions() if decomposed else program, tmp_path / "looked.pt2")
    loaded = load(ModelRef(ModelFormat.TORCH_EXPORT, str(tmp_path / "looked.pt2")))
    executable = loaded.executable
    executable.check({"ids": torch.full((3, 5), 9), "scores": torch.randn(3, 5, 3)})
    executable.check({"ids": torch.zeros(0, 5, dtype=torch.int32), "scores": torch.randn(0, 5, 3)})
    for bad in (10, -1):
        ids = torch.zeros(3, 5, dtype=torch.int32)
        ids[1, 2] = bad
        with pytest.raises(InvalidTensor, match=rf"ids: holds an index outside the table of 10 rows, got {bad}"):
            executable.check({"ids": ids, "scores": torch.randn(3, 5, 3)})
