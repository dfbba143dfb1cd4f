from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from contracts.units import MIB, MS, US, S
from predictor.worker.devices.cpu import CpuDevice, CpuMeter, Pacer


class Clock:
    """Time that passes only when it is told to; sleeping takes `late_ns` longer than asked."""

    def __init__(self, late_ns: int = 0) -> None:
        self.now_ns = 5 * S
        self.late_ns = late_ns

    def __call__(self) -> int:
        return self.now_ns

    def sleep(self, seconds: float) -> None:
        self.now_ns += round(seconds * S) + self.late_ns

    def compute(self, ns: int) -> None:
        self.now_ns += ns


@pytest.mark.parametrize(("sm_percent", "expected_ms"), [(100, 10), (50, 20), (25, 40), (1, 1000)])
def test_a_batch_costs_and_occupies_its_compute_over_its_share(sm_percent: int, expected_ms: int) -> None:
    clock = Clock()
    meter = CpuMeter(sm_percent, clock, clock.sleep)
    begun_ns = clock.now_ns
    meter.start()
    clock.compute(10 * MS)
    meter.stop()
    assert meter.gpu_ns == expected_ms * MS
    assert clock.now_ns - begun_ns == expected_ms * MS
    assert meter.swap_ns == 0


def test_standing_still_for_weights_costs_nothing_and_is_told_apart() -> None:
    clock = Clock()
    meter = CpuMeter(100, clock, clock.sleep)
    meter.start()
    for _ in range(3):
        clock.compute(2 * MS)
        meter.stall(lambda: clock.compute(7 * MS))
    clock.compute(1 * MS)
    meter.stop()
    assert (meter.gpu_ns, meter.swap_ns) == (7 * MS, 21 * MS)


def test_a_paused_batch_starts_counting_again_and_keeps_its_swap_time() -> None:
    clock = Clock()
    meter = CpuMeter(50, clock, clock.sleep)
    meter.start()
    meter.stall(lambda: clock.compute(3 * MS))
    clock.compute(4 * MS)
    meter.stop()
    assert meter.gpu_ns == 8 * MS
    clock.compute(500 * MS)
    meter.start()
    clock.compute(1 * MS)
    meter.stop()
    assert (meter.gpu_ns, meter.swap_ns) == (2 * MS, 3 * MS)


def test_stopping_a_batch_that_never_started_costs_nothing() -> None:
    clock = Clock()
    meter = CpuMeter(50, clock, clock.sleep)
    meter.stop()
    assert (meter.gpu_ns, meter.swap_ns, clock.now_ns) == (0, 0, 5 * S)


@given(st.lists(st.integers(1, 3 * MS), min_size=1, max_size=50), st.integers(1, 100), st.integers(0, 100 * US))
def test_pacing_at_every_gate_keeps_the_share_however_late_sleeps_end(segments: list[int], sm_percent: int, late_ns: int) -> None:
    clock = Clock(late_ns)
    meter = CpuMeter(sm_percent, clock, clock.sleep)
    begun_ns = clock.now_ns
    meter.start()
    for ns in segments:
        clock.compute(ns)
        meter.pace()
    meter.stop()
    due_ns = sum(segments) * 100 // sm_percent
    assert meter.gpu_ns == due_ns
    assert due_ns - 1000 <= clock.now_ns - begun_ns <= due_ns + late_ns + 1000


def test_a_link_keeps_its_speed_over_late_pieces_and_catches_up_no_idle_time() -> None:
    pacer = Pacer(1_000_000_000)
    assert pacer.due_ns(1000, 10 * S) == 10 * S + 1000
    assert pacer.due_ns(1000, 10 * S + 1000 + 80 * US) == 10 * S + 2000, "a piece that began late arrives when it was due"
    assert pacer.due_ns(1000, 11 * S) == 11 * S + 1000


@pytest.mark.parametrize("link_bytes_per_s", [0, 4_000_000_000])
def test_a_copy_lands_at_its_offset_and_nowhere_else(link_bytes_per_s: int) -> None:
    fd = os.memfd_create("slab")
    os.posix_fallocate(fd, 0, 8 * MIB)
    device = CpuDevice(fd, 8 * MIB, 100, link_bytes_per_s)
    other = CpuDevice(fd, 8 * MIB, 100, 0)
    os.close(fd)
    weights = torch.randint(0, 256, (3 * MIB,), dtype=torch.uint8)
    device.pin(weights)
    for start, end in ((0, 1000), (1000, 2 * MIB), (2 * MIB, 3 * MIB)):
        device.copy(weights, start, end, MIB).wait()
    assert torch.equal(other.slab[MIB : 4 * MIB], weights)
    assert not other.slab[:MIB].any()
    assert not other.slab[4 * MIB :].any()
