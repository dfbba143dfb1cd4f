"""The protocols from outside: our server beside KServe's own and a bare echo, with the same model that does nothing and the same client.

`protocol_parts` measures; this names the figures and their targets. Speeds are ratios of medians over interleaved rounds.
"""

from __future__ import annotations

from benchmarks.protocol_parts import speed
from benchmarks.protocol_parts.messages import KINDS
from benchmarks.protocol_parts.speed import CROWD, LARGE, SMALL, Case, Found
from benchmarks.result import Metric, Result

_SPEEDUPS = {"v1": None, "v2": 5.0, "binary": 30.0, "grpc": 1.0}
_NAMES = {"v1": "v1_json", "v2": "v2_json", "binary": "v2_binary", "grpc": "grpc"}


def run(quick: bool) -> Result:
    """Measures all of it, one thing after another."""
    rounds, seconds, least = (3, 0.2, 2) if quick else (9, 1.0, 5)
    found = speed.measure(rounds, seconds, least)
    return Result(_large(found) | _small(found))


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
    for kind in KINDS:
        stock, ours = (found[Case(kind, SMALL, 1), name].latency_ms for name in ("stock", "ours"))
        metrics[f"small_c1_added_ms_{kind}"] = Metric(ours - stock, "ms", 0.5)
        metrics[f"small_c1_p50_ms_{kind}"] = Metric(ours, "ms")
    return metrics
