"""A plan's plots: how busy the devices would be over time against what runs now, and which function is called when."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from contracts.units import S
from simulator.planning.capacity import Capacity
from simulator.planning.demand import Floats
from simulator.planning.plan import Line, Plan

mpl.use("Agg")
_COLUMNS = 240
_HOUR_NS = 3600 * S
_ROWS = 40


def write(folder: Path, plan: Plan, capacity: Capacity) -> list[Path]:
    """devices.png and demand.png in a folder that is there."""
    figures = {"devices.png": _devices(plan, capacity), "demand.png": _demand(plan.lines, capacity)}
    for name, figure in figures.items():
        figure.savefig(folder / name, dpi=120)
    return [folder / name for name in figures]


def _devices(plan: Plan, capacity: Capacity) -> Figure:
    """GPU work per time as devices that it would fill; lines for what runs now and for the plan."""
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    axes = figure.add_subplot()
    wanted = [line.wanted for line in plan.lines]
    hours, end = _hours(capacity)
    low, mean, high = (_columns(capacity.busy(wanted, level)) for level in ("low", "mean", "high"))
    axes.fill_between(hours, low, high, step="post", alpha=0.3, color="#3b6ea5", label="busy, over the range of run times")
    axes.step(hours, mean, where="post", color="#3b6ea5", label="busy devices")
    axes.axhline(plan.now.most, color="#b5482f", label="devices now")
    axes.axhspan(plan.devices["low"], plan.devices["high"], color="#4c9f70", alpha=0.3)
    axes.axhline(plan.devices["high"], color="#4c9f70", label="devices with Sluice")
    for start in capacity.starts(wanted):
        axes.axvspan(start / _HOUR_NS, min(end, (start + capacity.spells.length_ns) / _HOUR_NS), color="grey", alpha=0.2)
    axes.set(xlabel="hours (grey: what was simulated)", ylabel="devices", title="How many devices the load fills", xlim=(0, end))
    axes.set_ylim(bottom=0)
    figure.legend(loc="outside lower center", ncols=4, fontsize=8)
    return figure


def _demand(lines: Sequence[Line], capacity: Capacity) -> Figure:
    """Requests a second of the busiest functions, as a heat map over time."""
    shown = sorted(lines, key=lambda line: -line.busy)[:_ROWS]
    rates = np.stack([_columns(capacity.counts(line.wanted) * S / capacity.demand.step_ns) for line in shown])
    figure = Figure(figsize=(10, 1.5 + 0.22 * len(shown)), layout="constrained")
    axes = figure.add_subplot()
    most = max(float(rates.max()), 1e-9)
    least = min(float(rates[rates > 0].min(initial=most)), most / 2)
    picture = axes.imshow(
        np.ma.masked_equal(rates, 0),
        aspect="auto",
        interpolation="nearest",
        norm=LogNorm(least, most),
        extent=(0, _hours(capacity)[1], len(shown), 0),
    )
    axes.set_yticks(np.arange(len(shown)) + 0.5, [line.wanted.key for line in shown], fontsize=7)
    axes.set(xlabel="hours", title="Who is called when")
    figure.colorbar(picture, label="requests/s")
    return figure


def _columns(by_step: Floats) -> Floats:
    """Means over so many steps that there are not too many columns; the last may be of fewer."""
    each = -(-len(by_step) // _COLUMNS)
    starts = np.arange(0, len(by_step), each)
    found: Floats = np.add.reduceat(by_step, starts) / np.diff(starts, append=len(by_step))
    return found


def _hours(capacity: Capacity) -> tuple[list[float], float]:
    """Where the columns begin, and where the last ends."""
    steps = capacity.demand.counts.shape[1]
    each = -(-steps // _COLUMNS)
    return [at * capacity.demand.step_ns / _HOUR_NS for at in range(0, steps, each)], capacity.demand.span_ns / _HOUR_NS
