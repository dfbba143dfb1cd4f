"""Every format and every network of the catalogue: what a lane computes from the store equals the loaded reference bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from contracts.artifact import WeightIndex
from contracts.functions import ModelFormat, ModelRef
from models.load import Loaded, load
from models.samples import sample_inputs
from models.store_writer import write

Place = Callable[[WeightIndex], Any]
HUGE = 1 << 40

SMALL = {
    "an MLP": "mlp?seed=3",
    "a deep, narrow MLP": "mlp?seed=4&width=32&depth=12",
    "a CNN": "cnn?seed=5&size=32",
    "a BERT of two layers": "bert-base?seed=6&num_hidden_layers=2&hidden_size=96&intermediate_size=128&vocab_size=300",
    "a ViT of two layers": "vit-b?seed=7&num_hidden_layers=2&hidden_size=96&intermediate_size=128&image_size=64",
    "a GPT-2 of two layers": "gpt2?seed=8&n_layer=2&n_embd=96&vocab_size=500",
    "the sentence encoder": "minilm",
    "the speech detector": "silero-vad",
}
LARGE = {"ResNet-50": "resnet50?seed=1&size=64", "BERT-base": "bert-base?seed=1", "ViT-B": "vit-b?seed=1", "GPT-2": "gpt2?seed=1"}


def _assert_same(place: Place, loaded: Loaded, index: WeightIndex, inputs: dict[str, Tensor]) -> None:
    reference = loaded.run(inputs)
    assert list(reference) == [spec.name for spec in loaded.signature.outputs]
    assert all(tensor.isfinite().all() for tensor in reference.values())
    swapped = place(index).run_behind_gates(inputs)
    resident = place(index)
    resident.arrive(index.total_bytes)
    for outputs in (swapped, resident.run(inputs)):
        assert list(outputs) == list(reference)
        for name, tensor in reference.items():
            assert tensor.dtype == outputs[name].dtype
            assert torch.equal(tensor, outputs[name]), name


def _tensors(ref: ModelRef, rows: int, seed: int) -> dict[str, Tensor]:
    return {name: torch.from_numpy(array) for name, array in sample_inputs(ref, rows, seed).items()}


@pytest.mark.parametrize("source", SMALL.values(), ids=SMALL)
@pytest.mark.parametrize("rows", [1, 3])
def test_catalogue_answers_bit_for_bit_while_its_weights_arrive_gate_by_gate(source: str, rows: int, store: Path, place: Place) -> None:
    ref = ModelRef(ModelFormat.CATALOG, source)
    loaded = load(ref)
    _assert_same(place, loaded, write(loaded, store, HUGE), _tensors(ref, rows, seed=rows))


@pytest.mark.parametrize("source", LARGE.values(), ids=LARGE)
def test_a_large_model_answers_bit_for_bit_while_its_weights_arrive_gate_by_gate(source: str, store: Path, place: Place) -> None:
    ref = ModelRef(ModelFormat.CATALOG, source)
    loaded = load(ref)
    index = write(loaded, store, HUGE)
    inputs = _tensors(ref, 1, seed=2)
    reference = loaded.run(inputs)
    outputs = place(index).run_behind_gates(inputs)
    assert all(torch.equal(reference[name], outputs[name]) for name in reference)


@pytest.mark.parametrize("rows", [1, 5])
def test_an_exported_program_answers_bit_for_bit_while_its_weights_arrive_gate_by_gate(rows: int, pt2: Path, store: Path, place: Place) -> None:
    ref = ModelRef(ModelFormat.TORCH_EXPORT, pt2.as_uri())
    loaded = load(ref)
    index = write(loaded, store, HUGE)
    assert len(index.gates) > 3
    _assert_same(place, loaded, index, _tensors(ref, rows, seed=rows))


@pytest.mark.parametrize("rows", [1, 5])
def test_torchscript_answers_bit_for_bit(rows: int, torchscript: Path, store: Path, place: Place) -> None:
    ref = ModelRef(ModelFormat.TORCHSCRIPT, str(torchscript))
    loaded = load(ref)
    index = write(loaded, store, HUGE)
    assert [gate.module for gate in index.gates] == [""]
    _assert_same(place, loaded, index, _tensors(ref, rows, seed=rows))


def test_a_gate_that_came_too_early_would_be_seen(store: Path, place: Place) -> None:
    """The gate test can fail: with one byte less than a gate asks for, the answer is wrong."""
    ref = ModelRef(ModelFormat.CATALOG, "mlp?seed=3")
    loaded = load(ref)
    placed = place(write(loaded, store, HUGE))
    placed.arrive(placed.index.gates[-1].need_bytes - 256)
    inputs = _tensors(ref, 1, seed=1)
    assert not torch.equal(placed.run(inputs)["scores"], loaded.run(inputs)["scores"])


def test_functions_that_differ_in_weights_share_a_program_and_may_share_a_module(store: Path, place: Place) -> None:
    refs = [ModelRef(ModelFormat.CATALOG, f"mlp?seed={seed}") for seed in (1, 2)]
    loaded = [load(ref) for ref in refs]
    first, second = [write(model, store, HUGE) for model in loaded]
    assert first.program_id == second.program_id
    assert first.digest != second.digest
    inputs = _tensors(refs[0], 2, seed=9)
    one, other = place(first), place(second)
    one.arrive(first.total_bytes)
    other.arrive(second.total_bytes)
    one.executable.bind(other.executable.weights())
    assert torch.equal(one.run(inputs)["scores"], loaded[1].run(inputs)["scores"])
    assert not torch.equal(loaded[0].run(inputs)["scores"], loaded[1].run(inputs)["scores"])
