"""The protocols from outside: our server beside KServe's own and a bare echo, with the same model that does nothing and the same client.

`protocol_parts` measures; this names the figures and their targets. Speeds are ratios of medians over interleaved rounds.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from benchmarks.protocol_parts import client, memory, soak, speed
from benchmarks.protocol_parts.churn import Node
from benchmarks.protocol_parts.messages import KINDS
from benchmarks.protocol_parts.speed import CROWD, LARGE, SMALL, Case, Found
from benchmarks.result import Metric, Result

_SPEEDUPS = {"v1": None, "v2": 5.0, "binary": 30.0, "grpc": 1.0}
_NAMES = {"v1": "v1_json", "v2": "v2_json", "binary": "v2_binary", "grpc": "grpc"}


_GROWTH_MIB = 8.0
"""What 100,000 requests may add to a process: 84 bytes each. An object kept for each would be more; an allocator's fragments are less."""
_PER = 100_000


@dataclass(frozen=True, slots=True)
class _Size:
    """How much is measured. `growth`: requests of the soak that memory is watched over, after a tenth as many that warm up."""

    rounds: int
    seconds: float
    least: int
    requests: int
    growth: int


_FULL = _Size(rounds=9, seconds=1.0, least=5, requests=10_000, growth=100_000)
_QUICK = _Size(rounds=3, seconds=0.2, least=2, requests=1_000, growth=0)


def run(quick: bool) -> Result:
    """Measures all of it, one thing after another."""
    size = _QUICK if quick else _FULL
    found = speed.measure(size.rounds, size.seconds, size.least)
    return Result(_large(found) | _small(found) | _soak(size), seeds=(client.SEED,))


def _soak(size: _Size) -> dict[str, Metric]:
    with soak.node() as node:
        verdict = asyncio.run(soak.drive(node, size.requests))
        metrics = {
            "soak_requests": Metric(verdict.asked, "requests"),
            "soak_changes": Metric(verdict.changes.done, "changes"),
            "soak_failed_changes": Metric(len(verdict.changes.failed), "changes", 0),
            "soak_refused": Metric(verdict.refused, "requests"),
            "soak_wrong": Metric(len(verdict.wrong), "requests", 0),
            "soak_lost": Metric(len(verdict.lost), "requests", 0),
        }
        if size.growth:
            metrics |= _growth(node, size)
    return metrics


def _growth(node: Node, size: _Size) -> dict[str, Metric]:
    """Memory of the node's processes while the same soak goes on."""
    footprints = memory.Footprints(node.server.process)
    every = size.growth // memory.SAMPLES
    asyncio.run(soak.drive(node, size.growth // 10))
    verdict = asyncio.run(soak.drive(node, size.growth, lambda done: footprints.sample(done) if done % every == 0 else None))
    growth = {f"growth_mib_{role}": Metric(mib, "MiB per 100,000 requests", _GROWTH_MIB) for role, mib in footprints.growth_mib(_PER).items()}
    return growth | {"growth_failed": Metric(len(verdict.wrong) + len(verdict.lost), "requests", 0)}


def _large(found: Found) -> dict[str, Metric]:
    metrics = {}
    for kind in KINDS:
        stock, ours = (found[Case(kind, LARGE, 1), name].latency_ms for name in ("stock", "ours"))
        name = _NAMES[kind]
        metrics[f"{name}_602k_speedup"] = Metric(stock / ours, "ratio", _SPEEDUPS[kind], "higher")
        metrics[f"{name}_602k_p50_ms"] = Metric(ours, "ms")
    case = Case("binary", LARGE, 1)
    metrics["v2_binary_602k_over_echo"] = Metric(found[case, "ours"].latency_ms / found[case, "echo"].latency_ms, "ratio", 2.0)
    return metrics


def _small(found: Found) -> dict[str, Metric]:
    metrics = {}
    for kind in KINDS:
        stock, ours = (found[Case(kind, SMALL, CROWD), name].throughput for name in ("stock", "ours"))
        metrics[f"small_c{CROWD}_throughput_ratio_{kind}"] = Metric(ours / stock, "ratio", 1.0, "higher")
        metrics[f"small_c{CROWD}_per_s_{kind}"] = Metric(ours, "1/s")
        stock, ours = (found[Case(kind, SMALL, CROWD), name].cost_us for name in ("stock", "ours"))
        metrics[f"small_c{CROWD}_cpu_ratio_{kind}"] = Metric(ours / stock, "ratio")
        metrics[f"small_c{CROWD}_cpu_us_{kind}"] = Metric(ours, "us")
    for kind in KINDS:
        stock, ours = (found[Case(kind, SMALL, 1), name].latency_ms for name in ("stock", "ours"))
        metrics[f"small_c1_added_ms_{kind}"] = Metric(ours - stock, "ms", 0.5)
        metrics[f"small_c1_p50_ms_{kind}"] = Metric(ours, "ms")
    return metrics
