"""GPU metrics over a driver that is there, that is not, and that goes away."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, generate_latest

from nodeagent.shell.gpu_metrics import GpuCollector
from nodeagent.shell.nvml import Nvml
from tests.nodeagent.fake_nvml import FakeGpu, FakeNvml


def scrape(library: FakeNvml) -> list[str]:
    registry = CollectorRegistry()
    registry.register(GpuCollector({"cuda:0": "GPU-0"}, lambda: Nvml(library)))
    return [line for line in generate_latest(registry).decode().splitlines() if not line.startswith("#")]


def test_what_the_driver_says_is_exported_and_what_it_does_not_say_is_not() -> None:
    samples = scrape(FakeNvml(FakeGpu(0)))
    assert 'sluice_gpu_busy_ratio{device="cuda:0"} 0.37' in samples
    assert 'sluice_gpu_pcie_bytes_per_second{device="cuda:0",direction="to_device"} 1.024e+06' in samples
    assert 'sluice_gpu_throttled{device="cuda:0",reason="power"} 1.0' in samples
    assert 'sluice_gpu_throttled{device="cuda:0",reason="thermal"} 0.0' in samples
    assert not any("sluice_gpu_memory_errors" in sample for sample in samples)


def test_without_a_driver_there_are_no_samples() -> None:
    assert scrape(FakeNvml(driver=False)) == []


def test_a_driver_that_goes_away_and_comes_back_is_found_again() -> None:
    library = FakeNvml(FakeGpu(0))
    registry = CollectorRegistry()
    registry.register(GpuCollector({"cuda:0": "GPU-0"}, lambda: Nvml(library)))
    assert generate_latest(registry)
    library.driver = False
    assert generate_latest(registry) == b""
    library.driver = True
    assert b"sluice_gpu_busy_ratio" in generate_latest(registry)
