"""How a lane finds out what its SM cap really is: what the driver says of its context, and what an occupancy kernel finds.

Only reports. Whether what was found is what was asked is for the agent to judge, and it fails closed: MPS, told a wrong folder, silently gives all
SMs.
"""

from __future__ import annotations

from predictor.worker.devices.base import Proof
from predictor.worker.devices.driver import Driver

_REPEATS = 7
_NS_PER_MS = 1_000_000


def occupancy_ns(driver: Driver) -> int:
    """The time of the occupancy kernel on the SMs that `compute` has: the best of a few, since a busy neighbour only makes it longer."""
    driver.occupy()
    best_ms = 0.0
    for _ in range(_REPEATS):
        begun, ended = driver.event(timing=True), driver.event(timing=True)
        begun.record(driver.compute)
        driver.occupy()
        ended.record(driver.compute)
        ended.synchronize()
        took_ms = begun.elapsed_time(ended)
        best_ms = min(best_ms, took_ms) if best_ms else took_ms
    return max(1, round(best_ms * _NS_PER_MS))


def prove(driver: Driver, whole_ns: int) -> Proof:
    """The cap of this lane, given what the kernel takes on the whole device (0: unknown, then nothing is measured)."""
    return Proof(driver.sms, round(100 * whole_ns / occupancy_ns(driver), 2) if whole_ns else 0.0)
