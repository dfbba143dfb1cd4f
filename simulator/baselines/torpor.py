"""Torpor (ATC 2025; FaaSwap before it): weights stay in host memory and are swapped in while layers run; one request at a time has the whole GPU.

Which request: that of the function whose required request count is small and positive, so that what can still be kept is kept. Which GPU: an idle one
that holds the model; else one whose link is idle, or else will be first. Which victim: light models and second copies before heavy sole copies, then
the one used longest ago.
"""

from __future__ import annotations

import heapq

from nodeagent.tokens import lateness_rank
from simulator.pool import Pool, PoolDevice, Request

HEAVY = 0.5
"""A model is heavy when its copy takes longer than this part of its run: then the swap shows."""


class Torpor:
    """Torpor's scheduler, queue and eviction. A function's rank changes only with its record, so those that wait stand in a heap."""

    def __init__(self) -> None:
        self._order: list[tuple[tuple[bool, float], int, int, int]] = []
        self._placed: dict[int, int] = {}

    def dispatch(self, pool: Pool) -> list[tuple[Request, PoolDevice]]:
        """`Scheduler`."""
        for model in pool.changed:
            self._place(pool, model)
        pool.changed.clear()
        idle = [device for device in pool.devices if device.idle]
        given = []
        while idle and self._order:
            _, _, model, turn = heapq.heappop(self._order)
            if turn == self._placed[model]:
                request = pool.queue.take(pool.queue.models[model][0])
                device = self._device(pool, request, idle)
                idle.remove(device)
                given.append((request, device))
                self._place(pool, model)
        return given

    def _place(self, pool: Pool, number: int) -> None:
        """Where a function that waits stands now; where it stood before counts no more."""
        turn = self._placed[number] = self._placed.get(number, 0) + 1
        if number in pool.queue.models:
            record, model = pool.records[number], pool.models[number]
            rank = lateness_rank(model.percentile, record.requests, record.requests - record.late)
            heapq.heappush(self._order, (rank, pool.queue.models[number][0].arrived_ns, number, turn))

    def victim(self, pool: Pool, device: PoolDevice) -> int:
        """`Scheduler`."""
        others = [other.models for other in pool.devices if other is not device]
        sole = {model: not any(model in models for models in others) for model in device.models}
        return next((model for model in device.models if not (sole[model] and _heavy(pool, model))), next(iter(device.models)))

    def _device(self, pool: Pool, request: Request, idle: list[PoolDevice]) -> PoolDevice:
        holder = next((device for device in idle if request.model in device.models), None)
        return holder or min(idle, key=lambda device: self._loading(pool, device))

    def _loading(self, pool: Pool, device: PoolDevice) -> int:
        """Until when the devices that share the link of this one load."""
        assert pool.swapping is not None
        link = device.number // pool.swapping.per_link
        neighbours = (other for other in pool.devices if other.number // pool.swapping.per_link == link)
        return max(0, *(other.loading_ns - pool.now_ns for other in neighbours), 0)


def _heavy(pool: Pool, number: int) -> bool:
    assert pool.swapping is not None
    model = pool.models[number]
    return model.weight_bytes * 1e9 / pool.swapping.bytes_per_s > HEAVY * model.run_ns
