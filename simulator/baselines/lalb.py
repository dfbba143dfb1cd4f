"""GPU-enabled FaaS (IPDPS 2023): load balancing, locality-aware load balancing (LALB), and LALB with out-of-order dispatch (O3).

One queue stands before all devices; a device that becomes idle is given work from it. Models stay where they were loaded until the least recently
used has to go.
"""

from __future__ import annotations

from simulator.pool import LeastRecentlyUsed, Pool, PoolDevice, Request

SKIP_LIMIT = 25
"""How often a request may be passed over under O3 (the paper's choice)."""


class LoadBalancing(LeastRecentlyUsed):
    """First come, first served: the head of the queue goes to whichever device is idle."""

    def dispatch(self, pool: Pool) -> list[tuple[Request, PoolDevice]]:
        """`Scheduler`."""
        idle = [device for device in pool.devices if device.idle]
        return [(pool.queue.take(pool.queue.head), device) for device in idle[: len(pool.queue)]]


class Lalb(LeastRecentlyUsed):
    """The head of the queue goes where its model is.

    That is an idle device that holds it; else a busy one that does, if it will be done sooner than a load takes; else it is loaded on an idle one.
    With a skip limit (O3) later requests may first be given to an idle device that holds their model.
    """

    def __init__(self, skip_limit: int = 0) -> None:
        self._skip_limit = skip_limit

    def dispatch(self, pool: Pool) -> list[tuple[Request, PoolDevice]]:
        """`Scheduler`."""
        idle = [device for device in pool.devices if device.idle]
        given: list[tuple[Request, PoolDevice]] = []
        while idle and pool.queue:
            hit = self._hit(pool, idle)
            request, device = hit if hit is not None else self._head(pool, idle)
            given.append((request, device))
            if device in idle:
                idle.remove(device)
        return given

    def _hit(self, pool: Pool, idle: list[PoolDevice]) -> tuple[Request, PoolDevice] | None:
        """The first request that an idle device has the model of; it overtakes only requests that may still be overtaken."""
        passed: list[Request] = []
        for request in pool.queue:
            holder = next((device for device in idle if request.model in device.models), None)
            if holder is not None:
                for other in passed:
                    other.skipped += 1
                return pool.queue.take(request), holder
            if request.skipped >= self._skip_limit:
                return None
            passed.append(request)
        return None

    def _head(self, pool: Pool, idle: list[PoolDevice]) -> tuple[Request, PoolDevice]:
        request = pool.queue.take(pool.queue.head)
        model = pool.models[request.model]
        holders = [device for device in pool.devices if device not in idle and request.model in device.models]
        soonest = min(holders, key=lambda device: device.done_ns, default=None)
        if soonest is not None and soonest.done_ns - pool.now_ns < pool.expected_load_ns(model):
            return request, soonest
        return request, idle[0]
