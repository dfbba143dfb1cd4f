"""A profile in the terminal: a table of latencies over SM x quota for each batch. Owns the tables; draws no plots and reads no files."""

from __future__ import annotations

from typing import Any

import msgspec
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from contracts.functions import PREFIX
from profiler.need import Need, Option
from profiler.profiles import Grid, Profile

_WIDE = 0.25


def render(profile: Profile, found: Need | None = None) -> RenderableType:
    """A head, a table for each batch, and the recommended share if there is one."""
    facts, points = profile.facts, profile.points
    beside = sum(point.beside_load for point in points)
    head = Text(f"{profile.function} on {profile.device} ({facts.name}, {facts.processors} processors), {len(points)} configurations measured")
    head.stylize("bold", 0, len(profile.function))
    if beside:
        head.append(f", {beside} of them beside other load", style="yellow")
    option = found.option if found is not None and found.verdict != "nothing" else None
    grid = profile.grid()
    parts: list[RenderableType] = [head]
    parts += [Padding(_table(profile, grid, index, option), (1, 0, 0, 0)) for index in range(len(grid.batches))]
    parts.append(
        Padding(
            Text("latency in ms, and its 90 % interval (yellow: a quarter more than expected is possible); bold: measured", style="dim"), (1, 0, 0, 0)
        )
    )
    if found is not None:
        parts.append(answer(found))
    return Group(*parts)


def answer(found: Need) -> RenderableType:
    """What `profiler.need` found, for people."""
    option = found.option
    style = "bold red" if found.verdict == "nothing" else "bold green"
    lines = [Text(found.reason, style=style)]
    if found.verdict != "nothing":
        lines.append(
            Text(
                f"{option.area_percent:.3g} % of a device, {100 * option.utilisation:.0f} % of it used; "
                f"batches of at most {option.max_batch} ({option.mean_batch:.1f} on average)"
            )
        )
        lines.append(Text(share_annotations(option), style="dim"))
    return Group(*lines)


def share_annotations(option: Option) -> str:
    """The share as an InferenceService's annotations."""
    values = {"sm-percent": option.sm_percent, "quota-percent": f"{option.quota_percent:g}", "max-batch": option.max_batch}
    return "\n".join(f'{PREFIX}{key}: "{value}"' for key, value in values.items())


def document(profile: Profile, found: Need | None) -> dict[str, Any]:
    """The same as JSON values: one entry a batch, each with rows by SM and columns by quota."""
    grid = profile.grid()
    return {
        "function": profile.function,
        "device": profile.device,
        "facts": msgspec.to_builtins(profile.facts),
        "sm_percent": list(grid.sm_percents),
        "quota_percent": list(grid.quota_percents),
        "batches": [
            {"batch": batch, "mean_ms": grid.mean_ms[at].tolist(), "low_ms": grid.low_ms[at].tolist(), "high_ms": grid.high_ms[at].tolist()}
            for at, batch in enumerate(grid.batches)
        ],
        "measured": [
            {
                "batch": point.batch,
                "sm_percent": point.sm_percent,
                "quota_percent": point.quota_percent,
                "latency_mean_ms": point.latency_mean_ms,
                "service_p99_ms": point.service_p99_ms,
                "beside_load": point.beside_load,
            }
            for point in profile.points
        ],
        "need": None if found is None else msgspec.to_builtins(found),
    }


def _table(profile: Profile, grid: Grid, at: int, option: Option | None) -> Table:
    batch = grid.batches[at]
    title = f"batch {batch}" if option is None or option.max_batch != batch else f"batch {batch} (recommended: {_share(option)})"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold", title_style="bold")
    table.add_column("SM \\ quota", justify="right")
    for quota in grid.quota_percents:
        table.add_column(f"{quota:g} %", justify="right", no_wrap=True)
    measured = {(point.sm_percent, point.quota_percent): point for point in profile.points if point.batch == batch}
    for row in reversed(range(len(grid.sm_percents))):
        sm = grid.sm_percents[row]
        cells = []
        for column, quota in enumerate(grid.quota_percents):
            mean, low, high = (float(values[at, row, column]) for values in (grid.mean_ms, grid.low_ms, grid.high_ms))
            wide = high > (1 + _WIDE) * mean
            cell = Text(_short(mean), style="bold" if (sm, quota) in measured else "")
            cells.append(cell.append(f" {_short(low)}–{_short(high)}", style="not bold yellow" if wide else "not bold dim"))
        table.add_row(f"{sm} %", *cells)
    return table


def _share(option: Option) -> str:
    return f"{option.sm_percent} % SM x {option.quota_percent:g} % of the time"


def _short(ms: float) -> str:
    """Three digits, and no more than one after the point."""
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.1f}" if ms >= 1 else f"{ms:.2f}"
