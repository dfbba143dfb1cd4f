"""Shares: whether saturating functions get the GPU time of their quotas, idle time is borrowed, limits hold, and how soon a new share acts.

Owns the functions that it declares. Counts the GPU time that each answer reports, from batch end to batch end, and holds the sum against the agent's
own accounts.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.node_parts.load import Record, elapse, rows_for, saturated
from benchmarks.node_parts.node import Node, catalogued
from contracts.functions import Function, Share
from contracts.units import MS
from models.samples import sample_inputs
from predictor.segment import Array

SOURCE = "mlp?width=1024&depth=8"
_FIRST_ROWS = 32
_SETTLE_S = 1.0
_CHANGE_BATCH_NS = 4 * MS


@dataclass(frozen=True, slots=True)
class Competition:
    """Percent of the time that each function used, by name; by how much agent and answers differ in GPU time (ns); requests without an answer."""

    percent: Mapping[str, float]
    batch_ms: float
    account_error_ns: int
    lost: int

    @property
    def total(self) -> float:
        """Percent of the time that the device was busy."""
        return sum(self.percent.values())


@dataclass(frozen=True, slots=True)
class Change:
    """The delay of each share change until the new rate held, in ms, and requests without an answer."""

    delays_ms: tuple[float, ...]
    lost: int


def function(name: str, source: str, seed: int, quota: float, limit: float) -> Function:
    """A function that can fill the device: all SMs, batches as long as wanted."""
    return Function(name, catalogued(f"{source}&seed={seed}"), share=Share.of(100, quota, limit), max_batch=1024)


async def compete(node: Node, shares: Mapping[str, tuple[float, float]], batch_ns: int, seconds: float, source: str = SOURCE) -> Competition:
    """Functions with these (quota, limit), all saturating, over `seconds` after the first second; each batch takes about `batch_ns`."""
    functions = [function(name, source, seed, *share) for seed, (name, share) in enumerate(shares.items())]
    async with node.serving(*functions):
        part = await _part(node, functions[0], batch_ns)
        for each in functions[1:]:
            await node.caller.call(each.key, part)
        before_ns = await _accounts(node)
        async with contextlib.AsyncExitStack() as stack:
            records = [await stack.enter_async_context(saturated(node, each.key, part)) for each in functions]
            await elapse(_SETTLE_S)
            interval = await elapse(seconds)
        after_ns = await _accounts(node)
    return Competition(
        percent={name: record.share(*interval) for name, record in zip(shares, records, strict=True)},
        batch_ms=statistics.fmean(record.used_ns / record.answered / MS for record in records),
        account_error_ns=max(abs(after_ns[record.key] - before_ns[record.key] - record.used_ns) for record in records),
        lost=sum(record.lost for record in records),
    )


async def change(node: Node, changes: int, low: float = 20, high: float = 60, seconds: float = 1.0) -> Change:
    """Switches a saturating function between two quotas (limits equal to them) while it runs.

    The delay is that of a step: with GPU time u used in the time T after the reply, the old rate held for (new T - u) / (new - old). Its grain is a
    batch.
    """
    one = function("changing", SOURCE, 0, low, low)
    delays_ms = []
    async with node.serving(one):
        part = await _part(node, one, _CHANGE_BATCH_NS)
        async with saturated(node, one.key, part) as record:
            await elapse(_SETTLE_S)
            old, new = low, high
            for _ in range(changes):
                await node.control.set_share(one.key, Share.of(100, new, new))
                changed_ns = time.monotonic_ns()
                await elapse(seconds)
                delays_ms.append(_delay_ms(record, changed_ns, old, new))
                old, new = new, old
    return Change(tuple(delays_ms), record.lost)


def _delay_ms(record: Record, changed_ns: int, old: float, new: float) -> float:
    first = next(at for at, done_ns in enumerate(record.done_ns) if done_ns >= changed_ns)
    used_ns, wall_ns = record.used_between(max(0, first - 1), record.answered - 1)
    return max(0.0, (new * wall_ns - 100 * used_ns) / (new - old) / MS)


async def _part(node: Node, one: Function, batch_ns: int) -> Mapping[str, Array]:
    return await rows_for(node, one.key, sample_inputs(one.model, _FIRST_ROWS, seed=1), batch_ns)


async def _accounts(node: Node) -> dict[str, int]:
    return {line.key: line.gpu_ns for line in (await node.status()).functions}
