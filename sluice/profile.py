"""`sluice profile`: the options of its commands. What they do is `sluice.profiling`, imported when one runs, for it takes a second to import."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from contracts.errors import InvalidValue, NotFound
from contracts.functions import Function
from sluice import options
from sluice.documents import read_functions

_EXAMPLE = Path("examples/functions.yaml")
_HOME = "$XDG_DATA_HOME/sluice or ~/.local/share/sluice"


class _Numbers(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.4 on
    """Numbers with commas between them, as a tuple."""

    name = "numbers"

    def __init__(self, kind: type[int] | type[float]) -> None:
        self.kind = kind

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(self.kind(part) for part in value.split(","))
        except ValueError:
            self.fail(f"{value!r} is no list of {'whole ' if self.kind is int else ''}numbers: write 1,4,8", param, ctx)


def _data_home() -> Path:
    home = os.environ.get("XDG_DATA_HOME")
    return (Path(home) if home else Path.home() / ".local" / "share") / "sluice"


_functions_file = click.option(
    "-f", "--file", "files", multiple=True, type=click.Path(path_type=Path), help=f"InferenceService documents (repeatable). [default: {_EXAMPLE}]"
)
_profiles = click.option(
    "--profiles", "folder", type=click.Path(path_type=Path, file_okay=False), help=f"Folder of measurements and estimator. [default: {_HOME}]"
)
_points = click.option("--points", type=click.Path(path_type=Path), help="The table of measurements. [default: points.parquet in the folder]")
_estimator = click.option(
    "--estimator",
    type=click.Path(path_type=Path),
    help="What `fit` wrote. [default: estimator.npz in the folder; without one, physics and probes alone]",
)
_device = click.option("--device", help="The device's id in the table, when it holds several.")
_beside_load = click.option("--beside-load", is_flag=True, help="Measure also while other work runs, and mark what was measured so.")


@click.group("profile")
def command() -> None:
    """Measure how fast functions run under each share, and what share they need."""


@command.command(
    "sweep",
    epilog=options.examples(
        "sluice profile sweep minilm silero-vad --budget 10",
        "sluice profile sweep -f team.yaml resnet50 --batches 1,4,8 --sm 10,25,50,100 --quota 10,30,100 --full-grid",
        "sluice profile sweep minilm --target-error 3 -o minilm.parquet --json",
    ),
)
@click.argument("functions", nargs=-1, metavar="[FUNCTION]...")
@_functions_file
@click.option("--device", default="cpu:0", show_default=True, help="What to measure on.")
@click.option("--batches", type=_Numbers(int), default="1,2,4,8", show_default=True, help="Rows of a batch.")
@click.option("--sm", type=_Numbers(int), default="10,25,50,75,100", show_default=True, help="Percentages of the SMs.")
@click.option("--quota", type=_Numbers(float), default="5,10,25,50,75,100", show_default=True, help="Percentages of the time.")
@click.option("--budget", type=click.FloatRange(min=0, min_open=True), metavar="MINUTES", help="Stop measuring after so long. [default: no limit]")
@click.option(
    "--target-error",
    type=click.FloatRange(0, 100, min_open=True),
    default=5.0,
    show_default=True,
    metavar="PERCENT",
    help="Stop at this expected error.",
)
@click.option("--full-grid", is_flag=True, help="Measure every configuration, whatever error is to be expected.")
@_beside_load
@click.option("--device-memory", callback=options.size, default="1Gi", show_default=True, metavar="SIZE", help="Memory of the device for weights.")
@click.option("--host-memory", callback=options.size, default="4Gi", show_default=True, metavar="SIZE", help="Budget of the weights in host memory.")
@click.option("--threads", type=click.IntRange(1, 256), default=1, show_default=True, help="Compute threads of a CPU lane.")
@click.option(
    "--visits", type=click.IntRange(1, 100), default=3, show_default=True, help="Measure each configuration so often, over the whole sweep."
)
@click.option("--seed", type=int, default=1, show_default=True, help="Of the sample inputs.")
@click.option("-o", "--output", "points", type=click.Path(path_type=Path), help="The table of measurements. [default: points.parquet in the folder]")
@_profiles
@_estimator
@options.as_json
@options.errors_in_one_line
def sweep_command(
    functions: tuple[str, ...],
    files: tuple[Path, ...],
    device: str,
    batches: tuple[int, ...],
    sm: tuple[int, ...],
    quota: tuple[float, ...],
    budget: float | None,
    target_error: float,
    full_grid: bool,
    beside_load: bool,
    device_memory: int,
    host_memory: int,
    threads: int,
    visits: int,
    seed: int,
    points: Path | None,
    folder: Path | None,
    estimator: Path | None,
    as_json: bool,
) -> None:
    """Measure functions on a device (all of the file's without a name), through the agent and real lanes.

    It begins with few configurations, goes on where the estimate is least certain, and ends at the target, the budget or the end of the grid. Every
    measurement is kept at once: a sweep that was stopped goes on where it was. It refuses to measure while something else uses the machine.
    """
    from profiler.session import NodeOptions
    from profiler.sweep import Plan
    from sluice import profiling

    plan = Plan(
        batches=batches,
        sm_percents=sm,
        quota_percents=quota,
        target_error=None if full_grid else target_error / 100,
        budget_s=None if budget is None else budget * 60,
        beside_load=beside_load,
        seed=seed,
        visits=visits,
    )
    node = NodeOptions(_known_device(device), device_memory, host_memory, threads)
    place = profiling.Place.of(folder or _data_home(), points, estimator)
    profiling.sweep(_chosen(functions, files), place, plan, node, as_json)


@command.command(
    "fit",
    epilog=options.examples(
        "sluice profile fit",
        "sluice profile fit v100.parquet h100.parquet -o estimator.npz",
    ),
)
@click.argument("tables", nargs=-1, type=click.Path(path_type=Path), metavar="[FILE]...")
@click.option("-o", "--output", "estimator", type=click.Path(path_type=Path), help="Where to write it. [default: estimator.npz in the folder]")
@_profiles
@options.as_json
@options.errors_in_one_line
def fit_command(tables: tuple[Path, ...], estimator: Path | None, folder: Path | None, as_json: bool) -> None:
    """Learn from sweeps (the folder's points.parquet, or FILE...) what to expect of the next model."""
    from sluice import profiling

    place = profiling.Place.of(folder or _data_home(), None, estimator)
    profiling.fit(tables or (place.points,), place.estimator, as_json)


@command.command(
    "evaluate",
    epilog=options.examples(
        "sluice profile evaluate --data v100-latency              the whole table: minutes",
        "sluice profile evaluate --data v100-latency --probes 16 --json",
    ),
)
@click.option(
    "--data",
    "data",
    required=True,
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder of the measurements that HAS-GPU's authors published: latency.csv.gz and graphs.jsonl.gz.",
)
@click.option(
    "--probes", type=_Numbers(int), default="1,2,4,8,12,16,20,24,29", show_default=True, help="Measurements of an unseen model that are known."
)
@options.as_json
@options.errors_in_one_line
def evaluate_command(data: Path, probes: tuple[int, ...], as_json: bool) -> None:
    """Say how well the estimator predicts what it has not seen, beside a formula and a boosted tree."""
    from sluice import profiling

    if min(probes) < 1:
        raise InvalidValue("must be at least 1", key="--probes", value=min(probes))
    profiling.evaluate(data, probes, as_json)


@command.command(
    "show",
    epilog=options.examples(
        "sluice profile show minilm",
        "sluice profile show minilm -o plots --slo-ms 200 --rate 20",
        "sluice profile show minilm --json | jq '.batches[0].mean_ms'",
    ),
)
@click.argument("function")
@click.option("-o", "--output", type=click.Path(path_type=Path, file_okay=False), help="Folder for the plots (PNG).")
@click.option("--slo-ms", type=float, help="Mark the share that keeps this latency (with --rate).")
@click.option("--rate", type=float, help="Requests a second (with --slo-ms).")
@click.option("--percentile", type=float, default=99.0, show_default=True, help="Of the requests that are to be answered in time.")
@click.option("--max-batch", type=click.IntRange(1, 1024), default=8, show_default=True, help="The function's longest batch.")
@_device
@_points
@_profiles
@_estimator
@options.as_json
@options.errors_in_one_line
def show_command(
    function: str,
    output: Path | None,
    slo_ms: float | None,
    rate: float | None,
    percentile: float,
    max_batch: int,
    device: str | None,
    points: Path | None,
    folder: Path | None,
    estimator: Path | None,
    as_json: bool,
) -> None:
    """Show the latency of FUNCTION over SM x quota, with intervals: a table, and plots with -o."""
    if (slo_ms is None) != (rate is None):
        raise click.UsageError("give --slo-ms and --rate together")
    from profiler.need import Objective
    from sluice import profiling

    objective = None if slo_ms is None or rate is None else Objective(slo_ms, rate, percentile)
    profile = profiling.Place.of(folder or _data_home(), points, estimator).profile(function, device)
    profiling.show(profile, objective, max_batch, output, as_json)


@command.command(
    "need",
    epilog=options.examples(
        "sluice profile need minilm --slo-ms 200 --rate 20",
        "sluice profile need resnet50 --slo-ms 500 --rate 2 --percentile 98 --max-batch 4 --json",
    ),
)
@click.argument("function")
@click.option("--slo-ms", type=float, required=True, help="The latency that is to be kept, queueing included.")
@click.option("--rate", type=float, required=True, help="Requests a second; they arrive at random.")
@click.option("--percentile", type=float, default=99.0, show_default=True, help="Of the requests that are to be answered in time.")
@click.option("--max-batch", type=click.IntRange(1, 1024), default=8, show_default=True, help="The function's longest batch.")
@_device
@_points
@_profiles
@_estimator
@options.as_json
@options.errors_in_one_line
def need_command(
    function: str,
    slo_ms: float,
    rate: float,
    percentile: float,
    max_batch: int,
    device: str | None,
    points: Path | None,
    folder: Path | None,
    estimator: Path | None,
    as_json: bool,
) -> None:
    """Say the smallest share with which FUNCTION keeps a latency at a rate, or why none does (exit code 3)."""
    from profiler.need import Objective
    from sluice import profiling

    objective = Objective(slo_ms, rate, percentile)
    profile = profiling.Place.of(folder or _data_home(), points, estimator).profile(function, device)
    if not profiling.need(profile, objective, max_batch, as_json):
        raise SystemExit(3)


@command.command(
    "interference",
    epilog=options.examples(
        "sluice profile interference minilm silero-vad resnet50",
        "sluice profile interference minilm resnet50 --seconds 10 -o interference.json --json",
    ),
)
@click.argument("functions", nargs=-1, required=True, metavar="FUNCTION...")
@_functions_file
@click.option("--device", default="cpu:0", show_default=True, help="What to measure on.")
@click.option("--batch", type=click.IntRange(1, 1024), default=1, show_default=True, help="Rows of a batch.")
@click.option("--seconds", type=click.FloatRange(min=0.1), default=4.0, show_default=True, help="Of measuring for each pair and split of the SMs.")
@_beside_load
@click.option("--threads", type=click.IntRange(1, 256), default=1, show_default=True, help="Compute threads of a CPU lane.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Where to write it. [default: interference.json in the folder]")
@_profiles
@options.as_json
@options.errors_in_one_line
def interference_command(
    functions: tuple[str, ...],
    files: tuple[Path, ...],
    device: str,
    batch: int,
    seconds: float,
    beside_load: bool,
    threads: int,
    output: Path | None,
    folder: Path | None,
    as_json: bool,
) -> None:
    """Run pairs of functions side by side, and learn how much they slow each other down."""
    from profiler.session import NodeOptions
    from sluice import profiling

    node = NodeOptions(_known_device(device), threads=threads)
    path = output or (folder or _data_home()) / "interference.json"
    profiling.interference(_chosen(functions, files), node, batch, seconds, beside_load, path, as_json)


@command.command(
    "features", epilog=options.examples("sluice profile features minilm --size seq=128", "sluice profile features resnet50 --batch 8 --json")
)
@click.argument("function")
@_functions_file
@click.option("--batch", type=click.IntRange(1, 1024), default=1, show_default=True, help="Rows of the run that is counted.")
@click.option("--size", "sizes", multiple=True, metavar="NAME=N", help="A named dimension of the inputs (repeatable).")
@options.as_json
@options.errors_in_one_line
def features_command(function: str, files: tuple[Path, ...], batch: int, sizes: tuple[str, ...], as_json: bool) -> None:
    """Count what a run of FUNCTION computes and moves, by kind of operator, without running it."""
    from sluice import profiling

    (found,) = _chosen((function,), files)
    profiling.features(found, batch, dict(map(_size, sizes)), as_json)


def _size(text: str) -> tuple[str, int]:
    name, _, number = text.partition("=")
    if not (name and number.isascii() and number.isdecimal() and int(number)):
        raise InvalidValue("must be written name=number", key="--size", value=text)
    return name, int(number)


def _known_device(device: str) -> str:
    kind, _, number = device.partition(":")
    if kind != "cpu" or not (number.isascii() and number.isdecimal()):
        raise InvalidValue("is no device that this version measures (write cpu:0)", key="--device", value=device)
    return device


def _chosen(names: tuple[str, ...], files: tuple[Path, ...]) -> list[Function]:
    """The functions of those names, or all; NotFound lists what there is."""
    known = read_functions(files or (_EXAMPLE,))
    if not names:
        return known
    found = []
    for name in names:
        fitting = [function for function in known if name in (function.name, function.key)]
        if not fitting:
            there = ", ".join(function.key for function in known)
            raise NotFound(f"no function {name!r} in {' '.join(map(str, files or (_EXAMPLE,)))} (there are: {there})")
        found += fitting
    return found
