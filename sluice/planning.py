"""What `sluice plan` does: gathers documents, load and run times, lets the simulator plan, and shows and writes the answer. Decides nothing."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import click
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from contracts.errors import InvalidFunction, InvalidValue, NotFound
from contracts.units import S, parse_bytes
from profiler import points
from profiler.points import Points
from simulator.measured import Profiles
from simulator.planning import demand, metrics, page, plan, report
from simulator.planning.capacity import Capacity, Job, Machine, Played, Spells, Tally, play
from simulator.planning.demand import Demand, Floats
from simulator.planning.metrics import Asked
from simulator.planning.plan import Running
from simulator.planning.prometheus import Prometheus, Window
from simulator.planning.wanted import Declared, Known, Wanted, declared, of_profile, of_range, wanted
from sluice.documents import documents
from sluice.status import console


@dataclass(frozen=True, slots=True)
class Options:
    """The options of the command, by their names; times in seconds, memory in bytes. What is given by name has "" for all others."""

    trace: Path | None
    prometheus: str | None
    since: int
    step: int
    metrics: str
    query_rate: str
    query_latency: str
    token_file: Path | None
    ca_file: Path | None
    profile: Path | None
    estimator: Path | None
    device: str | None
    latency_from_prometheus: bool
    run_ms: Mapping[str, str]
    weights: Mapping[str, str]
    slo_ms: Mapping[str, str]
    device_memory: int
    link_gb_per_s: float
    devices_per_node: int
    device_cost: float
    now: float | None
    max_devices: int
    spell: int
    spells: int
    seeds: int
    processes: int
    output: Path | None
    as_json: bool


@dataclass(frozen=True, slots=True)
class _Seen:
    """What the load's source told: the demand, mean latencies in ms and GPUs by function where it knows them."""

    demand: Demand
    latencies: Mapping[str, Floats]
    gpus: Mapping[str, Floats]


def run(files: Sequence[Path], asked: Options) -> bool:
    """Plans and shows; whether every function can be served."""
    functions = read(files)
    keys = [one.function.key for one in functions]
    _check_names(asked, functions)
    seen = _from_trace(asked.trace, keys) if asked.trace is not None else _from_prometheus(asked, keys)
    planned = _wanted(functions, asked, seen)
    machine = Machine(asked.device_memory, asked.devices_per_node, asked.link_gb_per_s)
    if asked.output is not None:
        asked.output.mkdir(parents=True, exist_ok=True)
    with _players(asked.processes) as players, _said() as said:
        capacity = Capacity(seen.demand, machine, Spells(asked.spell * S, asked.spells), asked.seeds, players, said)
        now, notes = _now(planned, capacity, seen, asked)
        total = None if asked.now is None else Running(asked.now, asked.now)
        found = plan.make(planned, capacity, now, asked.max_devices, total)
        document = report.document(found, capacity, asked.device_cost, (*seen.demand.notes, *notes))
        if asked.output is not None:
            (asked.output / "plan.json").write_text(json.dumps(document, indent=1))
            page.write(asked.output, found, capacity)
    if asked.as_json:
        click.echo(json.dumps(document))
    else:
        _show(found, document["notes"], capacity, asked)
    return all(line.verdict != "nothing will do" for line in found.lines)


def read(files: Sequence[Path]) -> list[Declared]:
    """The functions of all documents, of any runtime; InvalidFunction names file, document and key."""
    found: dict[str, Declared] = {}
    for place, document in ((place, document) for path in files for place, document in documents(path)):
        try:
            one = declared(document)
        except InvalidFunction as error:
            raise InvalidFunction(f"{place}: {error.message}") from None
        if one.function.key in found:
            raise InvalidFunction(f"{place}: metadata.name: {one.function.key!r} stands there twice")
        found[one.function.key] = one
    if not found:
        raise InvalidFunction(f"{' '.join(map(str, files))}: no document: write at least one InferenceService")
    return list(found.values())


def _from_trace(path: Path, keys: Sequence[str]) -> _Seen:
    return _Seen(demand.of_trace(path, keys), {}, {})


def _from_prometheus(asked: Options, keys: Sequence[str]) -> _Seen:
    """Rates, and what else it knows, of whole steps until now."""
    assert asked.prometheus is not None
    server = Prometheus(asked.prometheus, asked.token_file, asked.ca_file)
    window = Window(int(time.time()) // asked.step * asked.step, asked.step, asked.since // asked.step)
    chosen = Asked(asked.metrics, asked.query_rate, asked.query_latency)
    rates = metrics.rates(server, keys, window, chosen)
    latencies: Mapping[str, Floats] = {}
    if asked.latency_from_prometheus:
        if rates.source not in metrics.SOURCES and not asked.query_latency:
            raise InvalidValue("is needed with --query-rate and --latency-from-prometheus", key="--query-latency", value="")
        latencies = metrics.latencies(server, keys, window, chosen, rates.source)
    notes = [f"rates of {urlsplit(asked.prometheus).netloc}, counted by {rates.source}"]
    if rates.silent:
        notes.append(f"without a series there, so never called: {', '.join(rates.silent)}")
    return _Seen(demand.of_rates(keys, rates.per_s, asked.step * S, notes), latencies, metrics.gpus(server, keys, window))


def _wanted(functions: Sequence[Declared], asked: Options, seen: _Seen) -> list[Wanted]:
    """The functions with what is known of each."""
    if asked.estimator is not None and asked.profile is None:
        raise InvalidValue("needs --profile", key="--estimator", value=str(asked.estimator))
    measured = None if asked.profile is None else _Measured(points.read(asked.profile), Profiles(asked.profile, asked.estimator))
    found = []
    for one in functions:
        slo = _given(asked.slo_ms, one)
        found.append(wanted(one, _known(one, asked, seen, measured), None if slo is None else _number("--slo-ms", slo)))
    return found


@dataclass(frozen=True, slots=True)
class _Measured:
    table: Points
    profiles: Profiles

    def name(self, one: Declared) -> str | None:
        """Under which a function was measured: its key, or its name in any namespace."""
        key, name = one.function.key, one.function.name
        return key if key in self.table.functions else name if any(known.partition("/")[2] == name for known in self.table.functions) else None

    def weight_bytes(self, name: str) -> int:
        """Device memory of the weights."""
        return max(point.device_bytes for point in self.table.points if name in (point.function, point.function.partition("/")[2]))


def _known(one: Declared, asked: Options, seen: _Seen, measured: _Measured | None) -> Known:
    """Run times and weights: what was said on the command line goes before measurements, those before latencies.

    Neither matters for a function that is never called; NotFound for all others says how to tell them.
    """
    key, name = one.function.key, measured.name(one) if measured is not None else None
    said, weights = _given(asked.run_ms, one), _given(asked.weights, one)
    never = not seen.demand.counts[seen.demand.keys.index(key)].any()
    if weights is not None:
        weight_bytes = _size(weights)
    elif measured is not None and name is not None:
        weight_bytes = measured.weight_bytes(name)
    elif never:
        weight_bytes = 1
    else:
        raise NotFound(f"the size of {key}'s weights is not known: measure it (--profile), or give --weights {one.function.name}=SIZE")
    if said is not None:
        return of_range(*_range(said), weight_bytes, "--run-ms")
    if measured is not None and name is not None:
        return of_profile(measured.profiles, name, asked.device, weight_bytes)
    if key in seen.latencies:
        steps = seen.latencies[key]
        low, middle, high = (float(steps[min(len(steps) - 1, int(len(steps) * part))]) for part in (0.05, 0.5, 0.95))
        return of_range(low, high, weight_bytes, f"mean latencies of {len(steps)} steps, waiting included", middle)
    if never:
        return of_range(1.0, 1.0, weight_bytes, "nothing: it was never called")
    there = "" if measured is None else f" ({asked.profile} has {', '.join(measured.table.functions) or 'nothing'})"
    raise NotFound(
        f"how long {key} runs is not known{there}: measure it (--profile), give --run-ms {one.function.name}=MS, or use --latency-from-prometheus"
    )


def _now(planned: Sequence[Wanted], capacity: Capacity, seen: _Seen, asked: Options) -> tuple[dict[str, Running], list[str]]:
    """What serves now, by function, and how that is known."""
    now = {one.key: plan.running(one, capacity) for one in planned}
    if asked.now is not None:
        return now, []
    if not seen.gpus:
        return now, ["what runs now is taken from the documents: minReplicas times their GPUs, one where they name none"]
    for key, held in seen.gpus.items():
        now[key] = Running(float(held.max()), float(held.mean()))
    rest = [one.key for one in planned if one.key not in seen.gpus]
    more = f"; from the documents for {', '.join(rest)}" if rest else ""
    return now, [f"what runs now is what pods held, as kube-state-metrics saw it{more}"]


def _show(found: plan.Plan, notes: Sequence[str], capacity: Capacity, asked: Options) -> None:
    console().print(report.table(found, capacity.demand.span_ns / S))
    for line in (*report.totals(found, asked.device_cost), *notes):
        click.echo(line)


def _check_names(asked: Options, functions: Sequence[Declared]) -> None:
    """InvalidValue for a name in an option that is no function's."""
    known = {name for one in functions for name in (one.function.name, one.function.key, "")}
    for option, values in (("--run-ms", asked.run_ms), ("--weights", asked.weights), ("--slo-ms", asked.slo_ms)):
        for name in values:
            if name not in known:
                raise InvalidValue(f"is no function of the documents ({', '.join(one.function.key for one in functions)})", key=option, value=name)


def _given(values: Mapping[str, str], one: Declared) -> str | None:
    return values.get(one.function.key) or values.get(one.function.name) or values.get("")


def _range(text: str) -> tuple[float, float]:
    low, dots, high = text.partition("..")
    first = _number("--run-ms", low)
    last = _number("--run-ms", high) if dots else first
    if last < first:
        raise InvalidValue("must be written LOW..HIGH", key="--run-ms", value=text)
    return first, last


def _number(option: str, text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = 0.0
    if not 0 < found < float("inf"):
        raise InvalidValue("must be a number above 0", key=option, value=text)
    return found


def _size(text: str) -> int:
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise InvalidValue(str(error), key="--weights", value=text) from None


@contextmanager
def _players(processes: int) -> Iterator[Played]:
    """Plays jobs in processes, or here."""
    if processes == 1:
        yield lambda jobs: map(play, jobs)
        return
    with ProcessPoolExecutor(processes) as pool:

        def players(jobs: Iterable[Job]) -> Iterator[dict[str, Tally] | None]:
            return pool.map(play, jobs)

        yield players


@contextmanager
def _said() -> Iterator[Callable[[str], None]]:
    """A line on standard error that says what is simulated; nobody knows beforehand how much that will be."""
    columns = (SpinnerColumn(), TextColumn("{task.completed:.0f} simulations"), TimeElapsedColumn(), TextColumn("{task.description}", style="dim"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda told: bar.update(task, advance=1, description=told)
