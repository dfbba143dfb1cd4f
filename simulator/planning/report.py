"""A plan as numbers: one JSON document for machines and one table for people, from the same figures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from contracts.units import S, ms
from simulator.measured import Level
from simulator.planning.capacity import Capacity
from simulator.planning.plan import Line, Plan
from simulator.planning.wanted import LEVELS

HOURS_A_MONTH = 730.0
_COLUMNS = ("function", "req/s|", "at most|", "SLO", "", "SM % x time %|", "in SLO", "latency ms|", "now|", "verdict", "why")


def document(plan: Plan, capacity: Capacity, dollars_per_hour: float, notes: Sequence[str]) -> dict[str, Any]:
    """All of it. Levels are the ends and the middle of the run times that were assumed; a latency without requests is null."""
    wanted = [line.wanted for line in plan.lines]
    length_s = min(capacity.demand.span_ns, capacity.spells.length_ns) / S
    return {
        "span_s": capacity.demand.span_ns / S,
        "step_s": capacity.demand.step_ns / S,
        "simulated": {"starts_s": [start / S for start in capacity.starts(wanted)], "length_s": length_s, "seeds": capacity.seeds},
        "devices": {"now": plan.now.most, "plan": dict(plan.devices), "pool": dict(plan.pool)},
        "gpu_hours_a_month": {"now": plan.now.mean * HOURS_A_MONTH, "plan": {level: count * HOURS_A_MONTH for level, count in plan.devices.items()}},
        "saved_a_month": {level: saved(plan, level, dollars_per_hour) for level in LEVELS},
        "functions": [function(line) for line in plan.lines],
        "busy_devices": {level: capacity.busy(wanted, level).tolist() for level in LEVELS},
        "notes": list(notes),
    }


def saved(plan: Plan, level: Level, dollars_per_hour: float) -> dict[str, float]:
    """GPU hours and dollars that a month costs less (or, below 0, more) than what runs now."""
    hours = (plan.now.mean - plan.devices[level]) * HOURS_A_MONTH
    return {"gpu_hours": hours, "dollars": hours * dollars_per_hour}


def function(line: Line) -> dict[str, Any]:
    """One function's part of the document."""
    one = line.wanted
    found: dict[str, Any] = {
        "function": one.key,
        "verdict": line.verdict,
        "reason": line.reason,
        "class": one.function.cls.value,
        "slo": {"latency_ms": ms(one.function.slo.latency_ns), "percentile": one.function.slo.percentile},
        "requests_per_s": {"mean": line.mean_per_s, "peak": line.peak_per_s},
        "share": {"sm_percent": one.function.share.sm_percent, "quota_percent": line.quota_percent, "max_batch": one.function.max_batch},
        "busy_devices": line.busy,
        "devices": {"now": line.now.most, "now_mean": line.now.mean, "own": line.devices},
        "run_ms": {level: one.times[level].run_ms(1, 100) for level in LEVELS},
        "run_ms_from": one.known.source,
        "weight_bytes": one.known.weight_bytes,
    }
    for level, tally in line.tallies.items():
        latency = line.percentile_ms(level)
        outcome = {"requests": tally.requests, "late": tally.late, "unanswered": tally.unanswered, "kept": tally.kept(one)}
        found.setdefault("simulated", {})[level] = {**outcome, "latency_ms": None if math.isnan(latency) else latency}
    return found


def table(plan: Plan, span_s: float) -> Table:
    """A row a function, those that share first."""
    shown = Table(title=f"{len(plan.lines)} functions, {_span(span_s)}", title_justify="left", box=None, pad_edge=False, header_style="bold")
    for column in _COLUMNS:
        shown.add_column(column.removesuffix("|"), justify="right" if column.endswith("|") else "left", overflow="fold")
    order = ("share", "keep dedicated", "nothing will do")
    for line in sorted(plan.lines, key=lambda line: (order.index(line.verdict), -line.busy)):
        one = line.wanted
        slo = f"p{one.function.slo.percentile:g} {ms(one.function.slo.latency_ns):g} ms"
        rates = (f"{line.mean_per_s:.3g}", f"{line.peak_per_s:.3g}")
        share = f"{one.function.share.sm_percent} x {line.quota_percent:.3g}"
        shown.add_row(
            one.key,
            *rates,
            slo,
            "LS" if one.guaranteed else "BE",
            share,
            _kept(line),
            _latency(line),
            f"{line.now.most:g}",
            line.verdict,
            line.reason,
        )
    return shown


def totals(plan: Plan, dollars_per_hour: float) -> list[str]:
    """What it comes to, in sentences."""
    low_count, count = plan.devices["low"], plan.devices["high"]
    planned = f"{_between(low_count, count)} {'device' if count == 1 else 'devices'} ({count * HOURS_A_MONTH:,.0f} GPU hours a month)"
    shared = f"{_between(plan.pool['low'], plan.pool['high'])} of them shared by {sum(line.verdict == 'share' for line in plan.lines)} functions"
    found = [
        f"now: {plan.now.most:g} devices, {plan.now.mean:.3g} of them held on average ({plan.now.mean * HOURS_A_MONTH:,.0f} GPU hours a month)",
        f"with Sluice: {planned}, {shared}",
    ]
    high = saved(plan, "high", dollars_per_hour)
    if high["gpu_hours"] <= 0:
        return [*found, "sharing saves nothing here: keep what runs now"]
    low = saved(plan, "low", dollars_per_hour)
    money = f", {_between(high['dollars'], low['dollars'], '{:,.0f}')} dollars" if dollars_per_hour else ""
    return [*found, f"saved: {_between(high['gpu_hours'], low['gpu_hours'], '{:,.0f}')} GPU hours a month{money}"]


def _kept(line: Line) -> str:
    tally = line.tallies.get("high")
    if tally is None:
        return "-"
    if not tally.requests:
        return "not called then"
    return f"{'yes' if tally.kept(line.wanted) else 'no'}, {tally.late} of {tally.requests} late"


def _latency(line: Line) -> str:
    found = [line.percentile_ms(level) for level in LEVELS]
    return "-" if math.isnan(found[1]) else f"{found[1]:.1f} ({min(found):.1f} to {max(found):.1f})"


def _between(low: float, high: float, form: str = "{:g}") -> str:
    first, last = form.format(low), form.format(high)
    return first if first == last else f"{first} to {last}"


def _span(span_s: float) -> str:
    return f"{span_s / 3600:.3g} hours" if span_s >= 7200 else f"{span_s / 60:.3g} minutes"
