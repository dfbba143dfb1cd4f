"""The seal behind a slab: a pattern that nobody writes over, by which the lane of another GPU proves that it reads that slab right.

Direct access between GPUs is a matter of topology, driver and IOMMU, and where it does not work it may well seem to: bytes arrive, and are others.
"""

from __future__ import annotations

import torch

from contracts.errors import Unavailable
from contracts.units import MIB, S
from predictor.worker.devices.driver import Driver

BYTES = 2 * MIB
_READS = 16
_NS_PER_MS = 1_000_000


def write(driver: Driver, target: torch.Tensor, number: int) -> None:
    """Writes the pattern of `number` to `BYTES` of device memory; returns when it is there."""
    driver.copy(target, _pattern(number), driver.copies)
    written = driver.event()
    written.record(driver.copies)
    written.synchronize()


def read(driver: Driver, source: torch.Tensor, number: int) -> int:
    """Reads `BYTES` of another device's memory some times over; the speed in bytes/s. Unavailable when they are not the pattern of `number`."""
    expected = _pattern(number)
    found, host = driver.empty(expected), torch.zeros_like(expected)
    begun, ended, fetched = driver.event(timing=True), driver.event(timing=True), driver.event()
    driver.copy(found, host, driver.copies)
    begun.record(driver.copies)
    for _ in range(_READS):
        driver.copy(found, source, driver.copies)
    ended.record(driver.copies)
    driver.copy(host, found, driver.copies)
    fetched.record(driver.copies)
    fetched.synchronize()
    if not torch.equal(host, expected):
        raise Unavailable("what is read there is not what was written: this device cannot be trusted to read that one's memory")
    return round(_READS * BYTES * S / max(1.0, begun.elapsed_time(ended) * _NS_PER_MS))


def _pattern(number: int) -> torch.Tensor:
    return torch.randint(0, 256, (BYTES,), dtype=torch.uint8, generator=torch.Generator().manual_seed(number))
