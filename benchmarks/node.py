"""The serving core on one machine, against a real agent, fork server and lanes on the CPU device.

Right answers under swapping, shares, preemption, latency, swaps, and the scheduler's own speed. `node_parts` measures; this names the figures and
their targets.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import numpy as np
import uvloop

from benchmarks.node_parts import correctness, latency, preemption, scheduler, shares, swap
from benchmarks.node_parts.node import Node, running
from benchmarks.result import Metric, Result
from contracts.units import MS

_SEED = 7
_WINDOW_MS = 100
_BATCH_NS = 20 * MS
_LONG_BATCH_NS = 200 * MS


@dataclass(frozen=True, slots=True)
class _Size:
    """How much is measured."""

    requests: int
    share_s: float
    long_share_s: float
    changes: int
    turns: int
    turn_s: float
    calls: int
    layers: int
    swaps: int
    events: int


_FULL = _Size(requests=10_000, share_s=10, long_share_s=10, changes=10, turns=6, turn_s=10, calls=4_000, layers=12, swaps=15, events=40_000)
_QUICK = _Size(requests=1_000, share_s=1.5, long_share_s=4, changes=2, turns=2, turn_s=1.5, calls=800, layers=4, swaps=3, events=3_000)


def run(quick: bool) -> Result:
    """Measures all of it, one thing after another."""
    size = _QUICK if quick else _FULL
    metrics = _scheduler(size)
    metrics |= uvloop.run(_on_nodes(size))
    return Result(metrics, seeds=(_SEED,))


async def _on_nodes(size: _Size) -> dict[str, Metric]:
    metrics: dict[str, Metric] = {}
    async with running(swap.device_bytes(size.layers)) as node:
        for measure in (_latency, _preemption, _shares, _swap):
            metrics |= await measure(node, size)
    return metrics | await _correctness(size)


def _scheduler(size: _Size) -> dict[str, Metric]:
    slowest = min(scheduler.events_per_second(1000, 8, size.events, load, _SEED)[0] for load in (0.5, 0.8))
    return {"scheduler_events_per_s": Metric(slowest, "1/s", 20_000, "higher")}


async def _latency(node: Node, size: _Size) -> dict[str, Metric]:
    added_ms = await latency.added_ms(node, size.calls)
    return {
        "added_latency_p50_ms": Metric(float(np.percentile(added_ms, 50)), "ms", 0.5),
        "added_latency_p99_ms": Metric(float(np.percentile(added_ms, 99)), "ms"),
    }


async def _preemption(node: Node, size: _Size) -> dict[str, Metric]:
    found = await preemption.measure(node, size.turns, size.turn_s, _SEED)
    return {
        "preemption_p99_ratio": Metric(found.p99_ratio, "ratio", 1.3),
        "preemption_alone_p99_ms": Metric(float(np.percentile(found.alone_ms, 99)), "ms"),
        "preemption_segment_ms": Metric(found.segment_ms, "ms"),
        "preemption_wait_p50_ms": Metric(float(np.percentile(found.waits_ms, 50)), "ms"),
        "preemption_wait_p99_ms": Metric(float(np.percentile(found.waits_ms, 99)), "ms"),
    }


async def _shares(node: Node, size: _Size) -> dict[str, Metric]:
    quotas = {"thirty": (30.0, 30.0), "sixty": (60.0, 60.0)}
    short = await shares.compete(node, quotas, _BATCH_NS, size.share_s)
    long = await shares.compete(node, quotas, _LONG_BATCH_NS, size.long_share_s)
    lent = await shares.compete(node, {"thirty": (30, 100), "sixty": (60, 100)}, _BATCH_NS, size.share_s)
    held = await shares.compete(node, {"forty": (10, 40)}, _BATCH_NS, size.share_s)
    change = await shares.change(node, size.changes)
    runs = (short, long, lent, held)
    return {
        "share_error_points": Metric(_error(short), "points", 1.0),
        "share_error_long_batches_points": Metric(_error(long), "points", 1.0),
        "share_long_batch_ms": Metric(long.batch_ms, "ms"),
        "borrowed_percent": Metric(lent.total - 90, "% of time"),
        "busy_when_borrowing_percent": Metric(lent.total, "% of time", 95, "higher"),
        "limit_40_percent": Metric(held.total, "% of time", 41),
        "share_change_ms": Metric(max(change.delays_ms), "ms"),
        "share_change_windows": Metric(max(change.delays_ms) / _WINDOW_MS, "windows", 1.0),
        "share_change_lost_requests": Metric(change.lost + sum(each.lost for each in runs), "requests", 0),
        "account_error_ns": Metric(max(each.account_error_ns for each in runs), "ns", 0),
    }


def _error(found: shares.Competition) -> float:
    """The farthest from a quota."""
    return max(abs(found.percent["thirty"] - 30), abs(found.percent["sixty"] - 60))


async def _swap(node: Node, size: _Size) -> dict[str, Metric]:
    turns = await swap.measure(node, swap.cases(size.layers), size.swaps)
    nbytes = turns[0].nbytes["table"]
    copy_ns = statistics.median(turn.copy_ns for turn in turns)
    metrics = {
        "copy_ratio": Metric(statistics.median(turn.copy_ratio for turn in turns), "ratio", 0.8, "higher"),
        "copy_gb_per_s": Metric(nbytes / copy_ns, "GB/s"),
    }
    for name in ("vision", "network", "text"):
        metrics |= {
            f"cold_ratio_{name}": Metric(statistics.median(turn.cold_ratio(name) for turn in turns), "ratio", 1.15),
            f"beside_ratio_{name}": Metric(statistics.median(turn.beside_ratio(name) for turn in turns), "ratio"),
            f"cold_{name}_mb": Metric(turns[0].nbytes[name] / 1e6, "MB"),
            f"cold_{name}_copy_ms": Metric(copy_ns * turns[0].nbytes[name] / nbytes / MS, "ms"),
            f"cold_{name}_run_ms": Metric(statistics.median(turn.run_ns[name] for turn in turns) / MS, "ms"),
        }
    return metrics


async def _correctness(size: _Size) -> dict[str, Metric]:
    found = await correctness.measure(200, 20, size.requests, _SEED)
    return {
        "wrong_answers": Metric(found.wrong, "answers", 0),
        "requests": Metric(found.requests, "requests"),
        "swaps": Metric(found.swaps, "swaps"),
        "functions_held": Metric(found.holds, "functions"),
    }
