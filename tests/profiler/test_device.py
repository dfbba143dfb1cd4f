"""Facts of a device, measured by a process of its own."""

from __future__ import annotations

import math

import pytest

from contracts.errors import InvalidValue
from profiler.device import DeviceFacts, measure


def test_the_cpu_device_is_measured_as_a_lane_meets_it() -> None:
    facts = measure("cpu:0", 1 << 28, threads=1)
    assert (facts.kind, facts.processors, facts.memory_bytes) == ("cpu", 1, 1 << 28)
    assert facts.name
    for rate in (facts.flops_per_s, facts.memory_bytes_per_s, facts.copy_bytes_per_s):
        assert 1e7 < rate < 1e15


@pytest.mark.parametrize("device", ["tpu:0", "cpu", "cuda:0"])
def test_a_device_that_there_is_not_is_named(device: str) -> None:
    with pytest.raises(InvalidValue, match=f"must be cpu:N, got '{device}'"):
        measure(device, 1 << 28)


@pytest.mark.parametrize(
    "wrong", [{"processors": 0}, {"flops_per_s": -1.0}, {"memory_bytes_per_s": math.nan}, {"copy_bytes_per_s": math.inf}], ids=str
)
def test_impossible_facts_are_refused(wrong: dict[str, float]) -> None:
    right = {"processors": 1, "flops_per_s": 1e9, "memory_bytes_per_s": 1e9, "copy_bytes_per_s": 1e9, "memory_bytes": 1}
    with pytest.raises(InvalidValue, match=next(iter(wrong))):
        DeviceFacts(kind="cpu", name="x", clock_mhz=0, **{**right, **wrong})  # type: ignore[arg-type]
