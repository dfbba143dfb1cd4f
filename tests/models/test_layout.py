"""The order of first use and the gates, on modules made to be hard."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from contracts.artifact import Gate
from contracts.errors import InvalidArtifact
from models.layout import Layout, record


class Hard(nn.Module):
    """Child `b` runs before `a`; `a` runs twice, its own parameter waits for the second time; the parent uses two of its own between them."""

    def __init__(self) -> None:
        super().__init__()
        self.early = nn.Parameter(torch.rand(4))
        self.never = nn.Parameter(torch.rand(4))
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.late = nn.Parameter(torch.rand(4))
        self.idle = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """[4] -> [4]."""
        x = self.a(self.b(x * self.early))
        x = self.idle(self.a(x) + self.late)
        view: Tensor = self.c(x)
        return view


def _record(module: nn.Module) -> Layout:
    def run() -> Tensor:
        with torch.inference_mode():
            result: Tensor = module(torch.rand(4))
            return result

    weights = dict(module.named_parameters()) | dict(module.named_buffers())
    return record(module, {name: tensor.data for name, tensor in weights.items()}, run, opaque=False)


def test_weights_lie_in_the_order_of_first_use_and_unused_ones_last() -> None:
    names = [entry.name for entry in _record(Hard()).tensors]
    assert names[0] == "early"
    assert set(names[1:3]) == {"b.weight", "b.bias"}
    assert set(names[3:5]) == {"a.weight", "a.bias"}
    assert names[5] == "late"
    assert set(names[6:8]) == {"c.weight", "c.bias"}
    assert names[8:] == ["never"]


def test_a_gate_covers_everything_up_to_the_next_first_entry() -> None:
    layout = _record(Hard())
    end = {entry.name: entry.offset + entry.nbytes for entry in layout.tensors}
    gates: dict[str, Gate] = {gate.module: gate for gate in layout.gates}
    assert list(gates) == ["", "b", "a", "c"]
    assert gates[""].need_bytes == end["early"]
    assert gates["b"].need_bytes == max(end["b.weight"], end["b.bias"])
    assert gates["a"].need_bytes == end["late"], "used by the parent after the second call of `a`"
    assert gates["c"].need_bytes == max(end["c.weight"], end["c.bias"])
    assert layout.total_bytes == 9 * 256 + 0 * len(end)


def test_a_model_that_changes_a_buffer_is_refused() -> None:
    class Counter(nn.Module):
        count: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(4))

        def forward(self, x: Tensor) -> Tensor:
            self.count.add_(1)
            return x + self.count

    module = Counter()
    weights = {"count": module.count}
    run: Callable[[], object] = lambda: module(torch.rand(4))  # noqa: E731
    with pytest.raises(InvalidArtifact, match="count"):
        record(module, weights, run, opaque=False)


def test_a_model_without_weights_has_one_gate_that_needs_nothing() -> None:
    layout = _record(nn.ReLU())
    assert [(gate.module, gate.need_bytes) for gate in layout.gates] == [("", 0)]
    assert layout.total_bytes == 256
