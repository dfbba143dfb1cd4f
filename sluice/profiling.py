"""What the commands of `sluice profile` do: reads, measures, writes and shows. Its options are `sluice.profile`'s; no decision is made here."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import msgspec
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from contracts.errors import SluiceError
from contracts.functions import Function
from contracts.units import format_bytes
from profiler import interference as interferences
from profiler import need as needs
from profiler import pairs, points, profiles, v100
from profiler import show as shown
from profiler import sweep as sweeps
from profiler.dataset import population
from profiler.estimator import Estimator
from profiler.extract import extract
from profiler.features import Features
from profiler.need import Need, Objective
from profiler.planner import planners
from profiler.profiles import Profile
from profiler.session import NodeOptions
from profiler.sweep import Outcome, Plan
from sluice.status import console


@dataclass(frozen=True, slots=True)
class Place:
    """The files of a folder of profiles. `asked` says that the estimator was named, and so must be there."""

    points: Path
    estimator: Path
    asked: bool

    @classmethod
    def of(cls, folder: Path, points: Path | None, estimator: Path | None) -> Place:
        """What was named, or else the folder's own."""
        return cls(points or folder / "points.parquet", estimator or folder / "estimator.npz", estimator is not None)

    def trained(self) -> Path | None:
        """The estimator's file; None when there is none, and nobody asked for one."""
        return self.estimator if self.asked or self.estimator.exists() else None

    def profile(self, function: str, device: str | None) -> Profile:
        """A function's profile."""
        return profiles.load(self.points, self.trained(), function, device)


def sweep(functions: Sequence[Function], place: Place, plan: Plan, node: NodeOptions, as_json: bool) -> None:
    """Measures, with a progress bar on standard error, and says how it ended."""
    path = place.trained()
    estimator = Estimator() if path is None else Estimator.load(path)
    try:
        with _progress() as progress:
            outcomes = sweeps.sweep(functions, place.points, planners(estimator), plan, node, _follow(progress))
    except (SluiceError, KeyboardInterrupt):
        if place.points.exists() or place.points.with_name(f"{place.points.name}.journal").exists():
            click.echo(f"what was measured is kept in {place.points}; the same command goes on from there", err=True)
        raise
    if as_json:
        _write({"points": str(place.points), "outcomes": [msgspec.to_builtins(outcome) for outcome in outcomes]})
        return
    for outcome in outcomes:
        click.echo(f"{outcome.function}: {outcome.measured} configurations, {_ended(outcome)}")
    click.echo(f"in {place.points}: `sluice profile show {functions[0].name}` shows them")


def fit(tables: Sequence[Path], path: Path, as_json: bool) -> None:
    """Learns from whole tables."""
    samples = [sample for table in tables for sample in population(points.read(table))]
    estimator = Estimator.fit(samples)
    path.parent.mkdir(parents=True, exist_ok=True)
    estimator.save(path)
    if as_json:
        _write({"estimator": str(path), "models": len(samples), "summary": estimator.summary})
    else:
        click.echo(f"{path}: learnt from {len(samples)} models on {', '.join(sorted({sample.device for sample in samples}))}")


def evaluate(folder: Path, probes: Sequence[int], as_json: bool) -> None:
    """How well unseen configurations and unseen models of the published data are predicted, as a table or JSON."""
    from profiler import evaluate as evaluation  # scikit-learn takes a second, which the other commands should not wait for

    samples = v100.read(folder)
    with _progress() as progress:
        task = progress.add_task("evaluating", total=2 * len(samples), told="")
        scores = evaluation.evaluate(samples, probes, lambda told: progress.update(task, advance=1, told=told))
    if as_json:
        _write({"seed": evaluation.SEED, "scores": [asdict(score) for score in scores]})
        return
    table = _table("case", "method", "probes|", "mean error %|", "median error %|", "inside 90 % interval|", "not monotone|")
    for score in scores:
        inside = "" if score.coverage is None else f"{100 * score.coverage:.1f}"
        wrong = "" if score.non_monotone is None else str(score.non_monotone)
        probed = "" if score.probes is None else str(score.probes)
        table.add_row(score.case, score.method, probed, f"{100 * score.mape:.2f}", f"{100 * score.median_ape:.2f}", inside, wrong)
    console().print(table)


def show(profile: Profile, objective: Objective | None, max_batch: int, output: Path | None, as_json: bool) -> None:
    """A profile as tables or JSON, and as plots in a folder."""
    found = None if objective is None else needs.need(profile.estimate, objective, max_batch, profile.tail)
    files = []
    if output is not None:
        from profiler.plots import write  # matplotlib takes a second, which the tables should not wait for

        files = write(profile, found, output)
    if as_json:
        _write(shown.document(profile, found) | {"plots": [str(file) for file in files]})
        return
    console().print(shown.render(profile, found))
    for file in files:
        click.echo(file)


def need(profile: Profile, objective: Objective, max_batch: int, as_json: bool) -> bool:
    """The smallest share; whether there is one."""
    found: Need = needs.need(profile.estimate, objective, max_batch, profile.tail)
    if as_json:
        _write({"function": profile.function, "device": profile.device, **msgspec.to_builtins(found)})
    else:
        console().print(shown.answer(found))
    return found.verdict != "nothing"


def interference(functions: Sequence[Function], node: NodeOptions, batch: int, seconds: float, beside_load: bool, path: Path, as_json: bool) -> None:
    """Measures pairs side by side, and learns from them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _progress() as progress:
        task = progress.add_task("pairs", total=None, told="")

        def follow(pair: interferences.Pair, done: int, of: int) -> None:
            told = f"{pair.function} beside {pair.neighbour}: {pair.slowdown:.2f} times as long"
            progress.update(task, completed=done, total=of, told=told)

        found = pairs.measure(functions, node, batch=batch, seconds=seconds, beside_load=beside_load, on_progress=follow)
    found.save(path)
    if as_json:
        _write({"interference": str(path), **msgspec.to_builtins(found)})
        return
    table = _table("function", "beside", "SM %|", "its SM %|", "times as long|")
    for pair in found.pairs:
        table.add_row(pair.function, pair.neighbour, str(pair.sm_percent), str(pair.neighbour_sm_percent), f"{pair.slowdown:.2f}")
    console().print(table)
    click.echo(f"{path}: factors of pairs that were left out are off by {found.error:.2f} on average")


def features(function: Function, batch: int, sizes: Mapping[str, int], as_json: bool) -> None:
    """What a run computes and moves."""
    found: Features = extract(function.model, sizes)
    if as_json:
        _write({"function": function.key, "batch": batch, **msgspec.to_builtins(found), "totals": msgspec.to_builtins(found.totals(batch))})
        return
    table = _table("kind", "kernels|", "GFLOP|", "moved|", "weights|", "FLOP/byte|")
    for kind, work in sorted(found.kinds.items(), key=lambda entry: -entry[1].flops(batch)):
        flops, nbytes = work.flops(batch), work.bytes(batch)
        table.add_row(
            kind,
            str(work.kernels),
            f"{flops / 1e9:.3f}",
            format_bytes(round(nbytes)),
            format_bytes(work.weight_bytes),
            f"{flops / max(nbytes, 1):.1f}",
        )
    whole = found.totals(batch)
    numbers = (f"{whole.flops / 1e9:.3f}", format_bytes(round(whole.bytes)), format_bytes(whole.weight_bytes), f"{whole.intensity:.1f}")
    table.add_row("all", str(whole.kernels), *numbers, style="bold")
    console().print(table)
    at = "".join(f", {name} = {size}" for name, size in found.sizes.items())
    click.echo(f"batch {batch}{at}; the longest chain of kernels has {found.critical_path}")


def _ended(outcome: Outcome) -> str:
    error = "" if outcome.error is None else f" (error to be expected {100 * outcome.error:.1f} %)"
    return {"target": "the target is reached", "budget": "the budget is used up", "grid": "the grid is complete"}[outcome.reason] + error


@contextmanager
def _progress() -> Iterator[Progress]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[told]}", style="dim"),
    )
    with Progress(*columns, console=console(stderr=True)) as progress:
        yield progress


def _follow(progress: Progress) -> Callable[[sweeps.Progress], None]:
    tasks: dict[str, TaskID] = {}

    def follow(state: sweeps.Progress) -> None:
        if state.function not in tasks:
            tasks[state.function] = progress.add_task(state.function, told="")
        told = "" if state.error is None else f"error {100 * state.error:.1f} %  "
        if (point := state.point) is not None:
            told += f"batch {point.batch}, {point.sm_percent} % SM x {point.quota_percent:g} %: {point.latency_mean_ms:.1f} ms"
        told += f"  ({state.to_come} more visits)" if state.to_come else ""
        progress.update(tasks[state.function], completed=state.measured, total=state.grid, told=told)

    return follow


def _table(*columns: str) -> Table:
    """A bar at the end of a column's name means right."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column.removesuffix("|"), justify="right" if column.endswith("|") else "left")
    return table


def _write(document: Mapping[str, Any]) -> None:
    click.echo(json.dumps(document))
