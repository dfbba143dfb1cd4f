"""SM caps: how fast a compute-bound model runs in lanes of each size, beside its part of the SMs; and how soon a change of size acts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.node_parts.load import rows_for
from benchmarks.node_parts.node import Node, catalogued
from contracts.functions import Function, Share
from contracts.units import MS
from models.samples import sample_inputs
from predictor.segment import Array

_BATCH_NS = 20 * MS
_WARM_UP = 5
_BATCHES = 15
_SETTLE_BATCHES = 20

Part = Mapping[str, Array]


@dataclass(frozen=True, slots=True)
class Caps:
    """SM percent -> speed in percent of that on all SMs; and how many batches after a change of size still ran at the old one."""

    speed: dict[int, float]
    late_batches: int

    @property
    def worst_percent(self) -> float:
        """The farthest that a speed lies from its SMs' part, in percent of that part."""
        return max(abs(speed / percent - 1) * 100 for percent, speed in self.speed.items())


async def measure(node: Node, source: str, percents: Sequence[int]) -> Caps:
    """One function after another; the last of `percents` must be 100."""
    run_ns = {}
    part: Part = sample_inputs(catalogued(source), 8, seed=1)
    for percent in reversed(percents):
        function = Function(f"cap-{percent}", catalogued(source), share=Share.of(percent, 100), max_batch=1024)
        async with node.serving(function):
            if percent == 100:
                part = await rows_for(node, function.key, part, _BATCH_NS)
            replies = [await node.caller.call(function.key, part) for _ in range(_WARM_UP + _BATCHES)]
        run_ns[percent] = float(np.median([reply.answer.run_ns for reply in replies[_WARM_UP:]]))
    return Caps({percent: 100 * run_ns[100] / run_ns[percent] for percent in percents}, await _change(node, source, part))


async def _change(node: Node, source: str, part: Part) -> int:
    """Half of the SMs, then all of them: batches that were sent after the answer to the change, and took the time of half."""
    function = Function("changing", catalogued(source), share=Share.of(50, 100), max_batch=1024)
    async with node.serving(function):
        whole = Share.of(100, 100)
        await node.control.set_share(function.key, whole)
        for _ in range(_WARM_UP):
            await node.caller.call(function.key, part)
        await node.control.set_share(function.key, function.share)
        for _ in range(_WARM_UP):
            reply = await node.caller.call(function.key, part)
        half_ns = reply.answer.run_ns
        await node.control.set_share(function.key, whole)
        after = [(await node.caller.call(function.key, part)).answer.run_ns for _ in range(_SETTLE_BATCHES)]
    new_ns = float(np.median(after[_WARM_UP:]))
    return sum(1 for took_ns in after if abs(took_ns - half_ns) < abs(took_ns - new_ns))
