"""Preemption: what a best-effort neighbour that never pauses costs a latency-sensitive function.

Open-loop Poisson arrivals for a real voice detector, alone and beside the neighbour in turns, the very same arrivals in both. The neighbour runs
long batches in short segments, back to back.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.node_parts.load import rows_for, saturated
from benchmarks.node_parts.node import Node, Reply, catalogued
from contracts.functions import Function, FunctionClass, Share
from contracts.units import MS, S
from models.samples import sample_inputs
from predictor.segment import Array

_DEPTH = 64
_BATCH_NS = 50 * MS
_LOAD = 0.25
_WARM_UP = 30

URGENT = Function("urgent", catalogued("silero-vad"), share=Share.of(100, 90))
PATIENT = Function("patient", catalogued(f"mlp?width=256&depth={_DEPTH}"), cls=FunctionClass.BEST_EFFORT, share=Share.of(100, 1), max_batch=1024)


@dataclass(frozen=True, slots=True)
class Preempted:
    """Latencies of the urgent function, in ms, alone and beside the neighbour.

    `waits_ms`: how long it waited for the GPU where no other request of its own was in the way. `segment_ms`: a segment of the neighbour, which ran
    `neighbour_batches`.
    """

    alone_ms: NDArray[np.float64]
    beside_ms: NDArray[np.float64]
    waits_ms: NDArray[np.float64]
    segment_ms: float
    neighbour_batches: int

    @property
    def p99_ratio(self) -> float:
        """p99 beside the neighbour over p99 alone."""
        return float(np.percentile(self.beside_ms, 99) / np.percentile(self.alone_ms, 99))


async def measure(node: Node, turns: int, seconds: float, seed: int, urgent: Function = URGENT, patient: Function = PATIENT) -> Preempted:
    """`turns` of `seconds` alone and `seconds` beside the neighbour."""
    async with node.serving(urgent, patient):
        part = sample_inputs(urgent.model, 1, seed)
        long_batch = await rows_for(node, patient.key, sample_inputs(patient.model, 8, seed), _BATCH_NS)
        own_ns = float(np.median([(await node.caller.call(urgent.key, part)).answer.run_ns for _ in range(_WARM_UP)]))
        alone: list[Reply] = []
        beside: list[Reply] = []
        batches = used_ns = 0
        for turn in range(turns):
            gaps_s = _gaps(random.Random(seed + turn), seconds, own_ns / S / _LOAD)
            alone += await _arrivals(node, urgent.key, part, gaps_s)
            async with saturated(node, patient.key, long_batch, depth=2) as record:
                beside += await _arrivals(node, urgent.key, part, gaps_s)
            batches += record.answered
            used_ns += record.used_ns
    return Preempted(
        alone_ms=np.array([reply.total_ns / MS for reply in alone]),
        beside_ms=np.array([reply.total_ns / MS for reply in beside]),
        waits_ms=np.array([reply.answer.queue_ns / MS for reply in _unhindered(beside)]),
        segment_ms=used_ns / batches / _DEPTH / MS,
        neighbour_batches=batches,
    )


def _gaps(chance: random.Random, seconds: float, mean_s: float) -> list[float]:
    gaps: list[float] = []
    while sum(gaps) < seconds:
        gaps.append(chance.expovariate(1 / mean_s))
    return gaps


async def _arrivals(node: Node, key: str, part: Mapping[str, Array], gaps_s: list[float]) -> list[Reply]:
    """Sends requests at these distances, whether or not others are answered; returns when all are."""
    due_s = time.monotonic()
    tasks = []
    async with asyncio.TaskGroup() as group:
        for gap_s in gaps_s:
            due_s += gap_s
            await asyncio.sleep(max(0.0, due_s - time.monotonic()))
            tasks.append(group.create_task(node.caller.call(key, part)))
    return [task.result() for task in tasks]


def _unhindered(replies: list[Reply]) -> list[Reply]:
    """Those sent after all earlier ones were answered."""
    latest_ns = 0
    found = []
    for reply in replies:
        if reply.sent_ns > latest_ns:
            found.append(reply)
        latest_ns = max(latest_ns, reply.done_ns)
    return found
