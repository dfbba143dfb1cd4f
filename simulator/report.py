"""Outcomes as numbers: one JSON document for machines and one table for people, from the same figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.table import Table

from simulator.record import PARTS, together
from simulator.run import Outcome
from simulator.scenario import Scenario, World

Curves = Mapping[str, Sequence[tuple[float, float]]]
"""Policy -> (ms, percent of requests answered within it)."""

_PERCENTILES = (50, 95, 98, 99)
SHOWN: Mapping[str, tuple[str, str]] = {
    "functions_in_slo": ("functions in SLO", "{:.0f}"),
    "late_percent": ("late requests %", "{:.2f}"),
    "total_p50_ms": ("p50 ms", "{:.1f}"),
    "total_p98_ms": ("p98 ms", "{:.1f}"),
    "total_p99_ms": ("p99 ms", "{:.1f}"),
    "queue_p99_ms": ("queue p99 ms", "{:.1f}"),
    "swap_p99_ms": ("swap or load p99 ms", "{:.1f}"),
    "run_p50_ms": ("run p50 ms", "{:.1f}"),
    "cold_percent": ("cold requests %", "{:.2f}"),
    "loads": ("swaps or loads", "{:.0f}"),
    "gpus": ("GPUs used", "{:.0f}"),
    "utilisation_percent": ("GPU time busy %", "{:.1f}"),
    "gpu_seconds_reserved": ("GPU seconds reserved", "{:,.0f}"),
    "gpu_seconds_whole": ("of whole GPUs", "{:,.0f}"),
    "dollars": ("dollars", "{:,.2f}"),
    "dollars_whole": ("for whole GPUs", "{:,.2f}"),
}
"""Figure -> (its words, format): what people are shown of them all."""


def figures(world: World, outcome: Outcome) -> dict[str, float]:
    """All numbers of one policy and one seed; a latency without requests is nan."""
    records = outcome.records
    requests = sum(record.requests for record in records.values())
    found: dict[str, float] = {
        "requests": requests,
        "answered": sum(record.answered for record in records.values()),
        "functions": len(world.functions),
        "functions_in_slo": sum(records[function.key].within_slo(function.slo.percentile) for function in world.functions),
        "late_percent": _percent(sum(record.late for record in records.values()), requests),
        "cold_percent": _percent(sum(record.cold for record in records.values()), requests),
        "loads": outcome.loads,
        "gpus": outcome.gpus,
        "gpu_seconds_reserved": outcome.reserved_s,
        "gpu_seconds_busy": outcome.busy_s,
        "utilisation_percent": _percent(outcome.busy_s, outcome.reserved_s),
        "gpu_seconds_whole": outcome.reserved_s,
        **outcome.facts,
    }
    dollars_per_s = world.scenario.devices.dollars_per_hour / 3600
    found |= {"dollars": found["gpu_seconds_reserved"] * dollars_per_s, "dollars_whole": found["gpu_seconds_whole"] * dollars_per_s}
    for part, histogram in together(records.values()).items():
        found[f"{part}_mean_ms"] = histogram.mean_ms
        found |= {f"{part}_p{percent}_ms": histogram.percentile_ms(percent) for percent in _PERCENTILES}
    return found


def functions(world: World, outcome: Outcome) -> list[dict[str, Any]]:
    """The same for each function."""
    rows = []
    for function in world.functions:
        record = outcome.records[function.key]
        times = {f"{part}_p{percent}_ms": record.parts[part].percentile_ms(percent) for part in PARTS for percent in _PERCENTILES}
        rows.append(
            {
                "function": function.key,
                "requests": record.requests,
                "late": record.late,
                "in_slo": record.within_slo(function.slo.percentile),
                "rejected": dict(record.rejected),
                **times,
            }
        )
    return rows


def curve(outcome: Outcome) -> list[tuple[float, float]]:
    """The distribution of answers over all requests: those without an answer keep it below 100 %."""
    total = together(outcome.records.values())["total"]
    requests = sum(record.requests for record in outcome.records.values())
    return [(ms, percent * total.count / requests) for ms, percent in total.curve()]


def document(scenario: Scenario, outcomes: Mapping[str, Sequence[dict[str, float]]], details: Mapping[str, Any]) -> dict[str, Any]:
    """What is written as JSON: for each policy every seed's figures and their means; `details` by function, of the first seed."""
    policies = {policy: {"mean": mean(runs), "seeds": list(runs)} for policy, runs in outcomes.items()}
    return {"scenario": scenario.name, "span_s": scenario.span_s, "policies": policies, "functions": dict(details)}


def table(scenario: Scenario, outcomes: Mapping[str, Sequence[dict[str, float]]]) -> Table:
    """One column a policy: the means over the seeds."""
    shown = Table(title=f"{scenario.name}: {scenario.devices.total} GPUs, {scenario.span_s:g} s", title_justify="left")
    shown.add_column("")
    for policy in outcomes:
        shown.add_column(policy, justify="right", overflow="fold")
    means = [mean(runs) for runs in outcomes.values()]
    for key, (name, form) in SHOWN.items():
        shown.add_row(name, *("-" if np.isnan(one[key]) else form.format(one[key]) for one in means))
    return shown


def mean(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The figures of several seeds as one."""
    return {key: float(np.mean([run[key] for run in runs])) for key in runs[0]}


def _percent(part: float, whole: float) -> float:
    return 100 * part / whole if whole else 0.0
