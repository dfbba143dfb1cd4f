"""Keep-alive of whole models: what model servers and serverless platforms with warm containers do.

A model that was loaded stays until another needs its room, the one used longest ago first. Its requests wait for the device that holds it, however
busy; a model that nobody holds goes to the device that will be done first.
"""

from __future__ import annotations

from simulator.pool import LeastRecentlyUsed, Pool, PoolDevice, Request


class KeepAlive(LeastRecentlyUsed):
    """One copy of each model, first come, first served on its device."""

    def dispatch(self, pool: Pool) -> list[tuple[Request, PoolDevice]]:
        """`Scheduler`."""
        given = []
        coming: dict[int, PoolDevice] = {}
        while pool.queue:
            request = pool.queue.take(pool.queue.head)
            device = coming.get(request.model) or self._holder(pool, request.model) or min(pool.devices, key=lambda device: device.done_ns)
            coming[request.model] = device
            given.append((request, device))
        return given

    def _holder(self, pool: Pool, model: int) -> PoolDevice | None:
        return next((device for device in pool.devices if device.will_hold(model)), None)
