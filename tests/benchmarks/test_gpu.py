"""The GPU benchmark on the CPU device: every part runs, and none of them fails. Its figures there mean nothing."""

from __future__ import annotations

import asyncio

import pytest

from benchmarks import gpu
from contracts.units import MIB


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_part_runs() -> None:
    size = gpu.Size(
        device="cpu:0",
        models={"cnn": "cnn?seed=1", "resnet50": "mlp?seed=1"},
        largest="resnet50",
        long="mlp?width=256&depth=4",
        turns=2,
        share_s=1,
        calls=20,
        load_turns=1,
        load_s=1,
        churn_s=2,
        churned=("mlp?seed=1", "cnn?seed=1"),
        busy_s=1,
        limit_s=1500,
        percents=(50, 100),
        device_bytes=64 * MIB,
    )
    found = asyncio.run(gpu.measure(size))
    failed = [name for name, metric in found.items() if name.startswith("part_") and not metric.met]
    assert not failed
    assert found["churn_answers"].value > 0
    assert found["churn_wrong"].value == 0
