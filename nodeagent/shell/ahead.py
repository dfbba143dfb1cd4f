"""What lanes are told of ahead of need: a GPU's lanes attach the functions of their size, and pin their weights, before the first request comes.

Owns the order, most urgent and most used first, and how long a new function waits for its pinning. A lane works off one such attach at a time, so
that what a batch or a copy needs meanwhile goes first (`lane`). A CPU device has nothing to pin: its lanes learn of a function when they need it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterator, Mapping

from contracts.units import format_bytes
from nodeagent.shell.backends import Backend
from nodeagent.shell.functions import Entry, Functions
from nodeagent.shell.lane import Lane
from nodeagent.shell.lanes import Lanes
from nodeagent.shell.slabs import Slab
from nodeagent.state import NodeState

_log = logging.getLogger(__name__)
_PINNED_S = 30.0


class Ahead:
    """The attaches of one node that no batch has asked for yet."""

    def __init__(self, state: NodeState, functions: Functions, lanes: Lanes, slabs: Mapping[str, Slab]) -> None:
        self._state = state
        self._functions = functions
        self._lanes = lanes
        self._slabs = slabs
        self._told: set[str] = set()

    def lane_up(self, lane: Lane) -> None:
        """A lane serves: it attaches every function of its size and class, those first that wait for it, then those that are called most."""
        if not self._pins(lane):
            return
        now_ns, key = time.monotonic_ns(), (lane.spec.sm_percent, lane.spec.cls)
        of_its_size = [function for function in self._state.functions.values() if function.lane_key == key]
        of_its_size.sort(key=lambda function: (not function.queue, -function.need.per_second(now_ns)))
        lane.attach_ahead(*(self._functions[function.spec.key] for function in of_its_size))

    def function_changed(self, entry: Entry) -> None:
        """A function is ready, or has a new share: the lanes that it may run in from now on attach it."""
        for lane in self._lanes_of(entry):
            lane.attach_ahead(entry)

    async def pinned(self, entry: Entry) -> None:
        """Returns once a lane that a new function may run in has pinned its weights, or cannot; at once where there is no such lane yet."""
        lanes = list(self._lanes_of(entry))
        for lane in lanes:
            lane.attach(entry)
        if lanes:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(entry.attached.wait(), _PINNED_S)

    def unpinned(self, lane: Lane, entry: Entry) -> None:
        """The driver would not pin its weights; said once for each device."""
        if lane.spec.device not in self._told:
            self._told.add(lane.spec.device)
            size = format_bytes(entry.stored.index.total_bytes)
            _log.warning(
                "%s: %s of %s cannot be pinned, and may not be the last: swaps from there are slow", lane.spec.device, size, entry.function.key
            )

    def _lanes_of(self, entry: Entry) -> Iterator[Lane]:
        key = (entry.function.share.sm_percent, entry.function.cls)
        return (lane for lane in self._lanes if lane.state == "idle" and (lane.spec.sm_percent, lane.spec.cls) == key and self._pins(lane))

    def _pins(self, lane: Lane) -> bool:
        return self._slabs[lane.spec.device].backend is not Backend.PACE
