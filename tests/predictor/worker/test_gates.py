from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from contracts.artifact import Gate
from predictor.worker.gates import Gates, needs_of


@given(st.lists(st.integers(0, 1_000_000), min_size=1, max_size=300), st.integers(0, 1000))
def test_needs_never_fall_below_a_gates_own_nor_rise_above_the_last_and_wait_points_stay_few(steps: list[int], unused: int) -> None:
    ends = sorted(steps)
    gates = [Gate(f"m{i}", end) for i, end in enumerate(ends)]
    needs = needs_of(gates, ends[-1] + unused)
    assert [name for name, _ in needs] == [gate.module for gate in gates]
    raised = [need for _, need in needs]
    assert raised == sorted(raised)
    assert raised[-1] == ends[-1]
    assert all(own <= need <= own + (ends[-1] + unused) // 64 for own, need in zip(ends, raised, strict=True))
    assert len(set(raised)) <= 65


def test_hooks_are_there_while_armed_and_only_then() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    gates = Gates(module)
    passed: list[int] = []
    gates.arm((("", 1), ("0", 2), ("1", 3)), passed.append)
    gates.arm((("", 1), ("0", 2), ("1", 3)), passed.append)
    module(torch.zeros(1, 2))
    assert passed == [2, 3]
    gates.arm((("", 1), ("1", 4)), passed.append)
    module(torch.zeros(1, 2))
    assert passed == [2, 3, 4]
    gates.disarm()
    module(torch.zeros(1, 2))
    assert passed == [2, 3, 4]
    assert not any(part._forward_pre_hooks for part in module.modules())


def test_a_submodule_entered_twice_or_out_of_order_passes_its_own_gate_each_time() -> None:
    class Loop(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = torch.nn.Identity(), torch.nn.Identity()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(self.b(self.a(self.b(x))))

    module, passed = Loop(), []
    gates = Gates(module)
    gates.arm((("a", 10), ("b", 20)), passed.append)
    module(torch.zeros(1))
    assert passed == [20, 10, 20, 10]
