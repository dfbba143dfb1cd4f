"""What a lane makes of a batch: every datatype in and out, several tensors, and requests of different lengths side by side."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from contracts.artifact import DTYPE_BYTES
from contracts.functions import ModelFormat, ModelRef
from models.dtypes import TORCH_DTYPES
from predictor.tensors import NUMPY
from tests.models.text_models import Encoder, export
from tests.predictor.worker.conftest import Arrays, LaneEnd, Stored

Keep = Callable[[ModelRef], Stored]


class Shifted(nn.Module):
    """Moves each row by one and puts a weight of the same type where there is room; a number of another type goes its own way."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("last", torch.ones(1, 1, dtype=dtype))

    def forward(self, x: Tensor, n: Tensor) -> dict[str, Tensor]:
        """[batch, 3], [batch] -> the row [batch, 3], its first value [batch], twice n [batch]."""
        return {"row": torch.cat((x[:, 1:], self.last.expand(x.shape[0], 1)), 1), "first": x[:, 0].clone(), "twice": n * 2}


def exported(path: Path, dtype: torch.dtype) -> ModelRef:
    batch = torch.export.Dim("batch", max=16)
    inputs = (torch.ones(2, 3, dtype=dtype), torch.ones(2, dtype=torch.float64))
    program = torch.export.export(Shifted(dtype).eval(), inputs, dynamic_shapes={"x": {0: batch}, "n": {0: batch}})
    torch.export.save(program, path)
    return ModelRef(ModelFormat.TORCH_EXPORT, str(path))


def values(dtype: str, rows: int, seed: int) -> np.ndarray:
    """Any bits, except that a BOOL is 0 or 1."""
    random = np.random.default_rng(seed)
    raw = random.integers(0, 2 if dtype == "BOOL" else 256, rows * 3 * DTYPE_BYTES[dtype], np.uint8)
    return raw.view(NUMPY[dtype]).reshape(rows, 3)


@pytest.mark.parametrize("dtype", TORCH_DTYPES)
def test_every_datatype_goes_through_a_lane_bit_for_bit(dtype: str, lane: LaneEnd, keep: Keep, tmp_path: Path) -> None:
    model = keep(exported(tmp_path / "model.pt2", TORCH_DTYPES[dtype]))
    assert [spec.dtype for spec in model.index.signature.outputs] == [dtype, dtype, "FP64"]
    lane.load("shifted", model, 0)
    parts = [{"x": values(dtype, rows, seed=rows), "n": np.arange(rows) / 3} for rows in (1, 2)]
    for sent in (parts[:1], parts):
        batch = lane.batch("shifted", model, sent, lane.map())
        assert lane.answer(batch).error is None
        for number, part in enumerate(sent):
            found = batch.outputs(number)
            assert found["row"][:, :2].tobytes() == part["x"][:, 1:].tobytes()
            assert found["row"].dtype == NUMPY[dtype]
            assert found["first"].tobytes() == part["x"][:, 0].tobytes()
            np.testing.assert_array_equal(found["twice"], part["n"] * 2)


def sentence(tokens: int, seed: int, rows: int = 1) -> Arrays:
    random = np.random.default_rng(seed)
    return {"input_ids": random.integers(2, 16, (rows, tokens)), "attention_mask": np.ones((rows, tokens), np.int64)}


def padded(parts: list[Arrays], pad: int) -> Arrays:
    """What the lane must have made of the parts."""
    longest = max(part["input_ids"].shape[1] for part in parts)
    fills = {"input_ids": pad, "attention_mask": 0}
    return {
        name: np.concatenate([np.pad(part[name], ((0, 0), (0, longest - part[name].shape[1])), constant_values=fill) for part in parts])
        for name, fill in fills.items()
    }


LENGTHS = {"all alike": (7, 7), "the first is the longest": (9, 2, 4), "the last is the longest": (2, 3, 30), "a short one between": (12, 2, 12)}


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize(
    "source", ["export", "bert-base?num_hidden_layers=2&hidden_size=48&intermediate_size=64&vocab_size=16"], ids=["export", "bert"]
)
def test_a_padded_batch_is_that_of_torch_bit_for_bit_and_each_request_gets_its_own(
    source: str, lengths: tuple[int, ...], lane: LaneEnd, keep: Keep, tmp_path: Path
) -> None:
    ref = ModelRef(ModelFormat.CATALOG, source)
    if source == "export":
        ref = ModelRef(ModelFormat.TORCH_EXPORT, str(export(Encoder(), tmp_path / "encoder.pt2")))
    model = keep(ref)
    lane.load("encoder", model, 0)
    parts = [sentence(tokens, seed, rows=1 + seed % 2) for seed, tokens in enumerate(lengths)]
    batch = lane.batch("encoder", model, parts, lane.map())
    assert lane.answer(batch).error is None
    together = model.reference(padded(parts, pad=0))
    row = 0
    for number, part in enumerate(parts):
        rows, tokens = part["input_ids"].shape
        alone = model.reference(part)
        found = batch.outputs(number)
        for name, array in found.items():
            own = together[name][row : row + rows]
            own = own[:, :tokens] if name == "states" else own
            assert array.tobytes() == own.tobytes()
            assert array.shape == alone[name].shape
            np.testing.assert_allclose(array, alone[name], atol=1e-5)
        row += rows


def test_functions_of_one_program_are_padded_each_in_its_own_way(lane: LaneEnd, keep: Keep, tmp_path: Path) -> None:
    """They share a module, and the batch that is padded with a token that does not exist fails on its own."""
    model = keep(ModelRef(ModelFormat.CATALOG, "bert-base?num_hidden_layers=1&hidden_size=24&intermediate_size=32&vocab_size=16&seed=5"))
    signature = model.index.signature
    inputs = tuple(msgspec.structs.replace(spec, pad=99 if spec.name == "input_ids" else 0) for spec in signature.inputs)
    other = Stored(msgspec.structs.replace(model.index, signature=msgspec.structs.replace(signature, inputs=inputs)), model.path, model.reference)
    lane.load("good", model, 0)
    lane.load("bad", other, 1 << 20)
    memory = lane.map()
    parts = [sentence(3, 1), sentence(5, 2)]
    assert lane.answer(lane.batch("good", model, parts, memory)).error is None
    error = lane.answer(lane.batch("bad", other, parts, memory, offset=1 << 20)).error
    assert error is not None
    assert error[0] == "InvalidTensor"
    assert "99" in error[1]
    assert lane.answer(lane.batch("good", model, parts, memory)).error is None
