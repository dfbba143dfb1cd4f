"""A profile as pictures: heatmaps of the latency over SM x quota, and curves with intervals. Owns the drawing; decides nothing about the data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from profiler.need import Need
from profiler.profiles import Grid, Profile

_DPI = 130
_PANELS = 4
_LINES = 4
_FINE = 61
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")  # Okabe and Ito: apart also for those who do not see all colours
_STAR: dict[str, Any] = {"marker": "*", "s": 260, "color": "#ffd400", "edgecolors": "black", "linewidths": 0.9, "zorder": 5, "clip_on": False}


def write(profile: Profile, found: Need | None, folder: Path) -> list[Path]:
    """Two PNG files in the folder, which is made if it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    name = profile.function.replace("/", ".")
    files = []
    for kind, figure in (("heatmap", heatmaps(profile, found)), ("curves", curves(profile))):
        path = folder / f"{name}-{kind}.png"
        FigureCanvasAgg(figure)
        figure.savefig(path, format="png")
        files.append(path)
    return files


def heatmaps(profile: Profile, found: Need | None = None) -> Figure:
    """A panel for each batch: latency by colour, lines of equal latency, dots where it was measured, a star at the recommended share."""
    batches = _few(sorted({point.batch for point in profile.points}), _PANELS)
    grid = _fine(profile, batches)
    least, most = float(grid.mean_ms.min()), float(grid.mean_ms.max())
    norm = LogNorm(least, max(most, least * 1.01))
    figure = Figure(figsize=(0.9 + 3.6 * len(batches), 4.1), layout="constrained", dpi=_DPI)
    panels: Sequence[Axes] = figure.subplots(1, len(batches), sharey=True, squeeze=False)[0]
    levels = [float(value) for value in LogLocator(subs=(1, 2, 5)).tick_values(least, most) if least <= value <= most]
    image = None
    for at, (panel, batch) in enumerate(zip(panels, batches, strict=True)):
        image = panel.pcolormesh(
            grid.quota_percents, grid.sm_percents, grid.mean_ms[at], norm=norm, cmap="viridis_r", shading="gouraud", rasterized=True
        )
        if levels:
            lines = panel.contour(grid.quota_percents, grid.sm_percents, grid.mean_ms[at], levels=levels, colors="white", linewidths=0.8)
            panel.clabel(lines, fmt=lambda value: f"{value:g} ms", fontsize=7)
        measured = [point for point in profile.points if point.batch == batch]
        panel.scatter(
            [point.quota_percent for point in measured],
            [point.sm_percent for point in measured],
            s=16,
            facecolors="white",
            edgecolors="black",
            linewidths=0.6,
            zorder=4,
            clip_on=False,
        )
        panel.set(title=f"batch {batch}", xlabel="quota, % of the time", xlim=(0, 100), ylim=(0, 100))
        if found is not None and found.verdict != "nothing" and batch == _panel_of(found.option.max_batch, batches):
            panel.scatter([found.option.quota_percent], [found.option.sm_percent], **_STAR)
    panels[0].set_ylabel("SM, % of the device")
    if image is not None:
        bar = figure.colorbar(image, ax=panels, label="latency, ms", ticks=levels, format=_plain(), pad=0.015)
        bar.ax.minorticks_off()
    figure.suptitle(f"{profile.function} on {profile.facts.name}", fontsize=11)
    caption = "dots: measured" if found is None or found.verdict == "nothing" else f"dots: measured; star: {found.reason}"
    figure.supxlabel(caption, fontsize=8, color="#444444")
    return figure


def curves(profile: Profile) -> Figure:
    """Latency over the SM share at some quotas, and over the quota at some SM shares, for the smallest and the largest batch, with 90 % intervals."""
    batches = _few(sorted({point.batch for point in profile.points}), 2)
    figure = Figure(figsize=(10.5, 0.7 + 3.2 * len(batches)), layout="constrained", dpi=_DPI)
    panels = figure.subplots(len(batches), 2, squeeze=False)
    for row, batch in zip(panels, batches, strict=True):
        measured = [point for point in profile.points if point.batch == batch]
        sms = _few(sorted({point.sm_percent for point in profile.points}), _LINES)
        quotas = _few(sorted({point.quota_percent for point in profile.points}), _LINES)
        _lines(row[0], _fine(profile, [batch], quotas=quotas), "sm", [(p.sm_percent, p.quota_percent, p.latency_mean_ms) for p in measured])
        _lines(row[1], _fine(profile, [batch], sms=sms), "quota", [(p.quota_percent, p.sm_percent, p.latency_mean_ms) for p in measured])
        row[0].set(xlabel="SM, % of the device", ylabel=f"latency at batch {batch}, ms")
        row[1].set(xlabel="quota, % of the time")
        row[1].sharey(row[0])
    figure.suptitle(f"{profile.function} on {profile.facts.name}: estimates with 90 % intervals, and what was measured (dots)", fontsize=11)
    return figure


def _lines(panel: Axes, grid: Grid, over: str, measured: Sequence[tuple[float, float, float]]) -> None:
    """One line with its band for each level of what is held, the greatest first."""
    levels = grid.quota_percents if over == "sm" else grid.sm_percents
    across = grid.sm_percents if over == "sm" else grid.quota_percents
    for colour, index in zip(_COLOURS, reversed(range(len(levels))), strict=False):
        mean, low, high = (values[0, :, index] if over == "sm" else values[0, index] for values in (grid.mean_ms, grid.low_ms, grid.high_ms))
        panel.plot(across, mean, color=colour, linewidth=1.6, label=f"{'quota' if over == 'sm' else 'SM'} {levels[index]:g} %")
        panel.fill_between(across, low, high, color=colour, alpha=0.18, linewidth=0)
        dots = [(x, latency) for x, held, latency in measured if held == levels[index]]
        panel.scatter([x for x, _ in dots], [latency for _, latency in dots], s=20, color=colour, edgecolors="white", linewidths=0.6, zorder=4)
    panel.set_yscale("log")
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter(_plain())
    panel.yaxis.set_minor_formatter(NullFormatter())
    panel.set_xlim(0, 100)
    panel.grid(which="major", color="#dddddd", linewidth=0.6)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False, fontsize=8)


def _plain() -> FuncFormatter:
    """20 and not 2 x 10^1."""
    return FuncFormatter(lambda value, _: f"{value:g}")


def _fine(profile: Profile, batches: Sequence[int], sms: Sequence[int] = (), quotas: Sequence[float] = ()) -> Grid:
    """Estimates between the levels that were measured, close enough for a smooth picture."""
    least_sm = min(point.sm_percent for point in profile.points)
    least_quota = min(point.quota_percent for point in profile.points)
    all_sms = range(least_sm, 101) if least_sm < 100 else (95, 100)
    all_quotas = np.linspace(min(least_quota, 95.0), 100, _FINE).tolist()
    return profile.grid(batches, sms or tuple(all_sms), quotas or tuple(all_quotas))


def _panel_of(batch: int, batches: Sequence[int]) -> int:
    """The panel of a batch: its own, or that of the next larger one."""
    return next((each for each in batches if each >= batch), batches[-1])


def _few(levels: Sequence[Any], most: int) -> list[Any]:
    """At most so many of the levels, evenly among them, both ends included."""
    if len(levels) <= most:
        return list(levels)
    return [levels[round(index * (len(levels) - 1) / (most - 1))] for index in range(most)]
