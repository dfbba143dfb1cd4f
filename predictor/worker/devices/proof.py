"""How a lane finds out what its SM cap really is: what the driver says of its context, and what an occupancy kernel finds.

Only reports. Whether what was found is what was asked is for the agent to judge, and it fails closed: MPS, told a wrong folder, silently gives all
SMs.
"""

from __future__ import annotations

from predictor.worker.devices.base import Proof
from predictor.worker.devices.driver import Driver

_LEAST_REPEATS = 7
_LEAST_NS = 200_000_000
"""A GPU that was idle takes some tens of milliseconds to come to its full clock."""
_NS_PER_MS = 1_000_000


def occupancy_ns(driver: Driver) -> int:
    """The time of the occupancy kernel on the SMs that `compute` has: the best of many: a low clock or a busy neighbour makes it longer."""
    times_ns: list[int] = []
    while len(times_ns) < _LEAST_REPEATS or sum(times_ns) < _LEAST_NS:
        begun, ended = driver.event(timing=True), driver.event(timing=True)
        begun.record(driver.compute)
        driver.occupy()
        ended.record(driver.compute)
        ended.synchronize()
        times_ns.append(max(1, round(begun.elapsed_time(ended) * _NS_PER_MS)))
    return min(times_ns)


def prove(driver: Driver, whole_ns: int) -> Proof:
    """The cap of this lane, given what the kernel takes on the whole device (0: unknown, then nothing is measured)."""
    return Proof(driver.sms, round(100 * whole_ns / occupancy_ns(driver), 2) if whole_ns else 0.0)
