"""A plan's plots: how busy the devices would be over time against what runs now, and which function is called when."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from simulator.planning.capacity import Capacity
from simulator.planning.plan import Line, Plan, busy_devices

mpl.use("Agg")
_COLUMNS = 240
_ROWS = 40


def write(folder: Path, plan: Plan, capacity: Capacity) -> list[Path]:
    """devices.png and demand.png in a folder that is there."""
    figures = {"devices.png": _devices(plan, capacity), "demand.png": _demand(plan.lines, capacity)}
    for name, figure in figures.items():
        figure.savefig(folder / name, dpi=120)
    return [folder / name for name in figures]


def _devices(plan: Plan, capacity: Capacity) -> Figure:
    """GPU work per time as devices that it would fill; lines for what runs now and for the plan."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.add_subplot()
    step_ns, hours = _steps(capacity)
    low, mean, high = (busy_devices(plan.lines, capacity, level, step_ns) for level in ("low", "mean", "high"))
    axes.fill_between(hours, low, high, step="post", alpha=0.3, color="#3b6ea5", label="busy, over the range of run times")
    axes.step(hours, mean, where="post", color="#3b6ea5", label="busy devices")
    axes.axhline(plan.now.most, color="#b5482f", label="devices now")
    axes.axhspan(plan.devices["low"], plan.devices["high"], color="#4c9f70", alpha=0.3)
    axes.axhline(plan.devices["high"], color="#4c9f70", label="devices with Sluice")
    for start in capacity.starts([line.wanted for line in plan.lines]):
        axes.axvspan(start / 3.6e12, min(capacity.span_ns, start + capacity.spells.length_ns) / 3.6e12, color="grey", alpha=0.2)
    axes.set(
        xlabel="hours (grey: what was simulated)", ylabel="devices", title="How many devices the load fills", xlim=(0, capacity.span_ns / 3.6e12)
    )
    axes.set_ylim(bottom=0)
    figure.legend(loc="outside right center", fontsize=8)
    return figure


def _demand(lines: Sequence[Line], capacity: Capacity) -> Figure:
    """Requests a second of the busiest functions, as a heat map over time."""
    shown = sorted(lines, key=lambda line: -line.busy)[:_ROWS]
    step_ns, hours = _steps(capacity)
    calls = [np.bincount(capacity.calls[0][line.wanted.key] // step_ns, minlength=len(hours)) for line in shown]
    rates = np.stack(calls) * 1e9 / step_ns
    figure = Figure(figsize=(10, 1.5 + 0.22 * len(shown)), layout="constrained")
    axes = figure.add_subplot()
    most = max(float(rates.max()), 1e-9)
    least = min(float(rates[rates > 0].min(initial=most)), most / 2)
    picture = axes.imshow(
        np.ma.masked_equal(rates, 0),
        aspect="auto",
        interpolation="nearest",
        norm=LogNorm(least, most),
        extent=(0, float(capacity.span_ns / 3.6e12), len(shown), 0),
    )
    axes.set_yticks(np.arange(len(shown)) + 0.5, [line.wanted.key for line in shown], fontsize=7)
    axes.set(xlabel="hours", title="Who is called when")
    figure.colorbar(picture, label="requests/s")
    return figure


def _steps(capacity: Capacity) -> tuple[int, list[float]]:
    """Length of a column in ns, and where the columns begin in hours."""
    step_ns = max(10_000_000_000, -(-capacity.span_ns // _COLUMNS))
    return step_ns, [at * step_ns / 3.6e12 for at in range(-(-capacity.span_ns // step_ns))]
