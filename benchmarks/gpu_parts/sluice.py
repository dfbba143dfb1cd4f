"""Sluice under a fleet's load: open-loop arrivals at a real node, each answer compared with the plain model's.

Owns the requests under way; a point ends when all of them are answered. A request counts from the moment at which it was due.
"""

from __future__ import annotations

import asyncio
import math
import statistics
import sys
import time
from collections.abc import Iterator, Sequence

from benchmarks.gpu_parts.answers import Outputs, compare
from benchmarks.gpu_parts.fleet import INPUTS, Fleet, Keeper, Point, Request, Served, arrivals, inputs
from benchmarks.node_parts.node import Node
from contracts.errors import SluiceError
from contracts.units import MS, S

_WARM_PASSES = 4
_STILL_FASTER = 0.9
_ATTACHED_S = 90.0
_POLL_S = 0.2
_CPU = "pace"


class Sluice:
    """A node that serves the whole fleet. `references`: of each function its answers to its kind's inputs."""

    def __init__(self, node: Node, fleet: Fleet, references: Sequence[Sequence[Outputs]], seed: int) -> None:
        self._node = node
        self._fleet = fleet
        self._references = references
        self._seed = seed
        self._parts = {kind: inputs(kind) for kind in set(fleet.kinds.values())}

    async def warm_up(self, lanes: int) -> list[Served]:
        """Calls every function until a pass is hardly faster than the one before: lanes are there, memory is pinned, libraries are loaded.

        `lanes` requests are under way at a time, and one more, so that every lane that there may be is started.
        """
        served: list[Served] = []
        before_ms = math.inf
        for number_of_pass in range(_WARM_PASSES):
            todo = iter([Request(0.0, number, number_of_pass % INPUTS) for number in range(len(self._fleet.functions))])
            found: list[Served] = []

            for worked in await asyncio.gather(*(self._ask_all(todo) for _ in range(lanes + 1))):
                found += worked
            await self._attached()
            served += found
            took_ms = statistics.median(each.latency_ms for each in found)
            if took_ms > _STILL_FASTER * before_ms:
                break
            before_ms = took_ms
        return served

    async def _attached(self) -> None:
        """Waits a little until the lanes of a GPU have attached and pinned all functions; a CPU device's learn of one when they need it."""
        deadline = time.monotonic() + _ATTACHED_S
        while time.monotonic() < deadline:
            device = (await self._node.status()).devices[0]
            if device.backend == _CPU or all(lane.attached >= len(self._fleet.functions) for lane in device.lanes):
                return
            await asyncio.sleep(_POLL_S)
        print("not all lanes have pinned all weights: swaps will be slow", file=sys.stderr)

    async def point(self, functions: int, rate: float, span_s: float) -> Point:
        """Stops sending once too many functions are out of their SLO."""
        requests = arrivals(functions, rate, span_s, self._seed)
        keeper = Keeper(self._fleet, functions, requests)
        point = Point(functions, rate)
        begun = time.monotonic()

        async def ask(request: Request) -> None:
            served = await self._ask(request, begun)
            point.served.append(served)
            keeper.add(served)

        async with asyncio.TaskGroup() as group:
            for request in requests:
                await asyncio.sleep(max(0.0, begun + request.due_s - time.monotonic()))
                if not keeper.holds:
                    break
                group.create_task(ask(request))
        point.out, point.broken_off = keeper.out, not keeper.holds
        return point

    async def _ask_all(self, todo: Iterator[Request]) -> list[Served]:
        """One after another, each due when the one before it is answered."""
        return [await self._ask(request, time.monotonic()) for request in todo]

    async def _ask(self, request: Request, begun: float) -> Served:
        function = self._fleet.functions[request.function]
        due_ns = round((begun + request.due_s) * S)
        part = self._parts[self._fleet.kinds[function.name]][request.input]
        try:
            reply = await self._node.caller.call(function.key, part, slo_deadline_ns=due_ns + function.slo.latency_ns)
        except SluiceError as error:
            return Served(request, math.inf, f"{type(error).__name__}: {error.message}", cold=False)
        verdict = compare(reply.outputs[0], self._references[request.function][request.input])
        return Served(request, (reply.done_ns - due_ns) / MS, verdict, reply.answer.cold)
