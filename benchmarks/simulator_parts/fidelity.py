"""Fidelity: one scenario run for real on the CPU device and simulated with its measured profile, under the very same arrivals.

Six functions of the catalogue share a device that holds less than all their weights, so that they are swapped in all the time. What the simulator is
told was measured beside it: run times by a sweep of the profiler, and by single requests through HTTP what lies around a run and what it costs to be
cold. A shared machine's speed moves by a fifth within minutes, which no simulator can know. So the run is cut into parts, single requests are sent
before, between and after them, and the simulator is told what these met on average; no request of the run itself is looked at for that. A pause
leaves the weights on the device that lay there, though not their order of use; the simulated run knows no pauses. The whole of it can be simulated
again: `sluice simulate benchmarks/results/fidelity/scenario.yaml --against benchmarks/results/fidelity/real.json`.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks.open_loop import Node, Reply, Request, play, serving
from benchmarks.result import Metric
from contracts.functions import Function, ModelFormat, ModelRef, Share, Slo
from contracts.units import MIB, MS, S
from models.describe import describe
from models.samples import sample_inputs
from profiler.estimator import Estimator
from profiler.measure import Sampling
from profiler.planner import planners
from profiler.points import Point, Points, read
from profiler.quiet import QUIET_CORES, Machine
from profiler.session import NodeOptions, Session, saturating, started
from profiler.sweep import Plan, sweep
from profiler.visits import pooled
from simulator import against, report
from simulator.against import Line, Real, RealFunction
from simulator.measured import factors_of
from simulator.run import simulate
from simulator.scenario import World, build, load
from sluice.control import read_status

SEED = 7
_KEPT = Path(__file__).parents[1] / "results" / "fidelity"
_DEVICE_BYTES = 320 * MIB
_LINK_BYTES_PER_S = 1_000_000_000
_NODE = ("--device-memory", str(_DEVICE_BYTES), "--link-bandwidth", str(_LINK_BYTES_PER_S))
_MAX_BATCH = 4
_SLO_MS = 1000.0
_QUOTA_PERCENT = 15.0
_THINK_S = 0.05


@dataclass(frozen=True, slots=True)
class _Load:
    """A function of the catalogue, and how often it is called: as often as keeps the device busy for this part of the time."""

    source: str
    busy: float
    pattern: str = "poisson"


_LOADS = {
    "minilm": _Load("minilm", 0.09),
    "resnet": _Load("resnet50?size=128", 0.07),
    "vit": _Load("vit-b?image_size=112&num_hidden_layers=4", 0.07),
    "mlp": _Load("mlp?width=2048&depth=6", 0.025, "bursty"),
    "cnn": _Load("cnn?size=128", 0.08),
    "vad": _Load("silero-vad", 0.02, "bursty"),
}


@dataclass(frozen=True, slots=True)
class _Size:
    """How long it all takes: the run with its warm-up, in how many `parts`; a round of single requests has `singles` of each function."""

    span_s: float
    warm_up_s: float
    parts: int
    singles: int
    handover_s: float
    sampling: Sampling


_FULL = _Size(span_s=120, warm_up_s=10, parts=4, singles=12, handover_s=5, sampling=Sampling(spread=0.02, enough=100, seconds=1, most_seconds=2))
_QUICK = _Size(span_s=20, warm_up_s=2, parts=2, singles=2, handover_s=1, sampling=Sampling(spread=0.05, seconds=0.3, most_seconds=0.6))


def measure(quick: bool) -> dict[str, Metric]:
    """Errors of the simulated latencies and GPU seconds; six minutes, `quick` one. A full run leaves its files under results/fidelity."""
    with tempfile.TemporaryDirectory(prefix="sluice-fidelity-") as folder:
        found = _run(Path(folder), _QUICK if quick else _FULL)
        if not quick:
            shutil.copytree(folder, _KEPT, dirs_exist_ok=True)
    return found


def _run(folder: Path, size: _Size) -> dict[str, Metric]:
    functions = [_function(name, each) for name, each in _LOADS.items()]
    table = folder / "points.parquet"
    with started(NodeOptions(device_bytes=_DEVICE_BYTES, link_bytes_per_s=_LINK_BYTES_PER_S)) as session:
        sweep(functions, table, planners(Estimator()), Plan((1, 2, _MAX_BATCH), (100,), (100,), None, None, True, SEED, size.sampling), session)
        handover_ms = _handover_ms(session, functions[-2:], size.handover_s)
    points, requests = read(table), {function.name: Request.of(function, _row(function)) for function in functions}
    with serving(functions, *_NODE) as node:
        rounds = [_singles(node, requests, points, size.singles)]
    known = _Calibration.of(points, rounds[0], handover_ms)
    per_minute = {name: round(60e3 * each.busy / known.run_ms[name], 1) for name, each in _LOADS.items()}
    # A new node, for the simulated one begins with an empty device too: what lies where decides what is evicted for what.
    with serving(functions, *_NODE) as node:
        world = _world(folder, size, points, known, per_minute)
        real = _real(node, world, requests, size.parts, lambda: rounds.append(_pause(node, requests, points, size.singles)))
    (folder / "real.json").write_bytes(against.encode(real))
    known = _Calibration.of(points, {name: [reply for each in rounds for reply in each[name]] for name in requests}, handover_ms)
    world = _world(folder, size, points, known, per_minute)
    outcome = simulate("sluice", world)
    figures = report.figures(world, outcome)
    lines = against.compare(real, figures, report.functions(world, outcome))
    beside = statistics.fmean(point.beside_load for point in points.points)
    return _metrics(lines, real, known) | {
        "fidelity_cold": Metric(figures["cold_percent"], "% of requests, simulated"),
        "fidelity_machine_drift": Metric(100 * _drift(rounds), "% slower in the slowest round of single requests than in the fastest"),
        "fidelity_machine_quiet": Metric(float(not real.beside), "1: nothing else used the machine", 1, "higher"),
        "fidelity_profile_beside_load": Metric(100 * beside, "% of the points"),
    }


def _function(name: str, each: _Load) -> Function:
    slo = Slo(int(_SLO_MS * MS))
    return Function(name, ModelRef(ModelFormat.CATALOG, each.source), share=Share.of(100, _QUOTA_PERCENT), slo=slo, max_batch=_MAX_BATCH)


def _row(function: Function) -> dict[str, Any]:
    """One row, the same that a sweep's batches begin with."""
    return {name: array[:1] for name, array in sample_inputs(function.model, _MAX_BATCH, SEED).items()}


def _handover_ms(session: Session, functions: Sequence[Function], seconds: float) -> float:
    """Two small functions keep the one lane busy: the time in which nothing ran, for each batch."""
    share = Share.of(100, 45)
    with contextlib.ExitStack() as stack:
        callers = []
        for function in functions:
            key, signature = stack.enter_context(session.serving(function, share)), describe(function.model).signature
            callers.append(session.caller(key, signature, _row(function)))
            stack.enter_context(callers[-1])
            callers[-1].call()
        stack.enter_context(saturating(callers[0]))
        callers[1].call()
        before, begun = session.status(), time.monotonic()
        while time.monotonic() < begun + seconds:
            callers[1].call()
        after, ended = session.status(), time.monotonic()
    batches = sum(line.answered for line in after.functions) - sum(line.answered for line in before.functions)
    ran_s = (after.devices[0].busy_ns - before.devices[0].busy_ns) / S
    return 1e3 * max(0.0, ended - begun - ran_s) / batches


def _real(node: Node, world: World, requests: Mapping[str, Request], parts: int, pause: Callable[[], None]) -> Real:
    """Sends the scenario's arrivals in parts of one length, a pause after each; latencies from the end of the warm-up on."""
    names = [function.name for function in world.functions]
    due = list(zip((world.arrivals.at_ns / S).tolist(), (names[number] for number in world.arrivals.function), strict=True))
    length_s = world.arrivals.span_ns / S / parts
    replies: list[Reply | None] = []
    busy_ns, swaps, cores = 0, 0, 0.0
    for part in range(parts):
        before, machine = read_status(node.run_dir).devices[0], Machine(os.getpid())
        now_due = [(at - part * length_s, requests[name]) for at, name in due if part == min(parts - 1, int(at / length_s))]
        replies += play(node, now_due)
        after, cores = read_status(node.run_dir).devices[0], max(cores, machine.cores())
        busy_ns, swaps = busy_ns + after.busy_ns - before.busy_ns, swaps + after.swaps - before.swaps
        pause()
    counted: dict[str, list[Reply | None]] = {name: [] for name in names}
    for (at, name), reply in zip(due, replies, strict=True):
        if at >= world.scenario.warm_up_s:
            counted[name].append(reply)
    return Real(
        world.scenario.name,
        world.seed,
        tuple(_seen(function.key, counted[function.name]) for function in world.functions),
        gpu_s=busy_ns / S,
        swaps=swaps,
        beside=f"other processes use {cores:.1f} cores" if cores > QUIET_CORES else "",
    )


def _seen(key: str, replies: Sequence[Reply | None]) -> RealFunction:
    answered = [reply for reply in replies if reply is not None]
    return RealFunction(key, tuple(round(reply.latency_ms, 3) for reply in answered), len(replies) - len(answered))


def _singles(node: Node, requests: Mapping[str, Request], points: Points, times: int) -> dict[str, list[Reply]]:
    """Single requests, each sent when the one before must have been answered.

    Two functions take turns (a b a b), then another two: so each is often cold, then mostly warm, and never finds the caches as it left them.
    """
    chance, names = np.random.default_rng(SEED), list[str]()
    for _ in range(times // 2):
        order = chance.permutation(list(requests)).tolist()
        for pair in zip(order[::2], order[1::2], strict=True):
            names += pair * 2
    found: dict[str, list[Reply]] = {name: [] for name in requests}
    for name, reply in zip(names, _one_by_one(node, requests, points, names), strict=True):
        if reply is not None:
            found[name].append(reply)
    return found


def _pause(node: Node, requests: Mapping[str, Request], points: Points, times: int) -> dict[str, list[Reply]]:
    """A round of single requests, after which the weights lie on the device that lay there before."""
    resident = [line.key.partition("/")[2] for line in read_status(node.run_dir).functions if line.resident_on]
    found = _singles(node, requests, points, times)
    _one_by_one(node, requests, points, resident)
    return found


def _one_by_one(node: Node, requests: Mapping[str, Request], points: Points, names: Sequence[str]) -> list[Reply | None]:
    """What calls of these functions meet, each sent when the one before must have been answered."""
    patience_s = {name: 1.5 * (point.gpu_ms + point.swap_ms) / 1e3 + _THINK_S for name, point in _profiled(points).items()}
    starts_s = np.cumsum([_THINK_S, *(patience_s[name] for name in names)]).tolist()
    return play(node, [(at_s, requests[name]) for at_s, name in zip(starts_s, names, strict=False)])


@dataclass(frozen=True, slots=True)
class _Calibration:
    """What single requests through HTTP say beyond the profile.

    `run_ms`: the GPU time of a warm run between other functions' runs, and `scale`: how many times that of the profile, whose runs follow each other;
    `around_ms`: what a request spends on the way, but for the `handover_ms` between agent and lane; `cold`: the GPU time of a run whose weights are
    being copied over that of a warm one; `tail`: by which part of the run a cold one outlasts its copy.
    """

    run_ms: Mapping[str, float]
    scale: Mapping[str, float]
    around_ms: Mapping[str, float]
    handover_ms: float
    cold: float
    tail: float

    @classmethod
    def of(cls, points: Points, singles: Mapping[str, Sequence[Reply]], handover_ms: float) -> _Calibration:
        """From replies to single requests."""
        profiled = _profiled(points)
        run_ms = {name: _usual(_warm_ms(replies)) for name, replies in singles.items()}
        cold = [(name, reply) for name, replies in singles.items() for reply in replies if reply.cold]
        slower = [reply.run_ms / run_ms[name] for name, reply in cold]
        # Where the copy was longer than the run; else nothing of the tail can be seen.
        tails = [(reply.swap_ms + reply.run_ms - _copy_ms(profiled[name])) / reply.run_ms for name, reply in cold if reply.swap_ms > reply.run_ms]
        return cls(
            run_ms,
            {name: run_ms[name] / (point.gpu_ms * _usual(factors_of(point))) for name, point in profiled.items()},
            {name: max(0.0, statistics.median(map(_around_ms, replies)) - handover_ms) for name, replies in singles.items()},
            handover_ms,
            max(1.0, statistics.median(slower)) if slower else 1.0,
            min(1.0, max(0.0, statistics.median(tails))) if tails else 0.1,
        )


def _profiled(points: Points) -> dict[str, Point]:
    """By name, the point of one row."""
    return {point.function.partition("/")[2]: point for point in pooled(points.points) if point.batch == 1}


def _warm_ms(replies: Sequence[Reply]) -> list[float]:
    """GPU times of warm runs; of all in a run so short that none was warm."""
    return [reply.run_ms for reply in replies if not reply.cold] or [reply.run_ms for reply in replies]


def _around_ms(reply: Reply) -> float:
    """What is called a queue is here a step of the agent: nobody else is there."""
    return reply.around_ms + reply.queue_ms


def _copy_ms(point: Point) -> float:
    return 1e3 * point.device_bytes / _LINK_BYTES_PER_S


def _usual(values: Sequence[float]) -> float:
    """The mean of all but the greatest twentieth: few samples say little of the tail."""
    return statistics.fmean(sorted(values)[: math.ceil(0.95 * len(values))])


def _world(folder: Path, size: _Size, points: Points, known: _Calibration, per_minute: Mapping[str, float]) -> World:
    """The scenario's file, written and read again; its arrivals depend on the rates alone."""
    groups = [
        {
            "name": name,
            "weights": str(point.device_bytes),
            "load": {"per_minute": per_minute[name], "pattern": _LOADS[name].pattern},
            "time": {"profile": "points.parquet", "models": [name], "scale": round(known.scale[name], 4)},
            "slo_ms": _SLO_MS,
            "max_batch": _MAX_BATCH,
            "quota_percent": _QUOTA_PERCENT,
            "around_ms": round(known.around_ms[name], 3),
        }
        for name, point in _profiled(points).items()
    ]
    document = {
        "name": "fidelity",
        "span_s": size.span_s,
        "warm_up_s": size.warm_up_s,
        "seed": SEED,
        "devices": {"memory": str(_DEVICE_BYTES), "link_gb_per_s": _LINK_BYTES_PER_S / 1e9},
        "hardware": {"handover_ns": round(known.handover_ms * MS), "tail": round(known.tail, 3), "cold_slowdown": round(known.cold, 3)},
        "functions": groups,
    }
    path = folder / "scenario.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return build(load(path), 0)


def _drift(rounds: Sequence[Mapping[str, Sequence[Reply]]]) -> float:
    """How much slower single runs were in the slowest round than in the fastest."""
    usual_ms = {name: statistics.median(_warm_ms(replies)) for name, replies in rounds[0].items()}
    slower = [statistics.median(statistics.median(_warm_ms(each[name])) / usual_ms[name] for name in each) for each in rounds]
    return max(slower) / min(slower) - 1


def _metrics(lines: Sequence[Line], real: Real, known: _Calibration) -> dict[str, Metric]:
    found = {line.figure: line for line in lines}
    each = {line.figure: abs(line.error_percent) for line in lines if " p" in line.figure and line.error_percent is not None}

    def error(figure: str) -> float:
        return abs(found[figure].error_percent or 0.0)

    def worst(percentile: str) -> float:
        return max(off for figure, off in each.items() if f" {percentile} " in figure)

    return {
        "fidelity_p50_error": Metric(error("p50 ms"), "%", 10),
        "fidelity_p99_error": Metric(error("p99 ms"), "%", 20),
        "fidelity_gpu_seconds_error": Metric(error("GPU seconds"), "%", 5),
        "fidelity_worst_function_p50_error": Metric(worst("p50"), "%"),
        "fidelity_worst_function_p99_error": Metric(worst("p99"), "%"),
        "fidelity_swaps_error": Metric(error("swaps"), "%"),
        "fidelity_requests": Metric(found["answered"].real, "requests"),
        "fidelity_failed": Metric(sum(one.failed for one in real.functions), "requests", 0),
        "fidelity_p50": Metric(found["p50 ms"].real, "ms"),
        "fidelity_p99": Metric(found["p99 ms"].real, "ms"),
        "fidelity_gpu_seconds": Metric(real.gpu_s, "s"),
        "fidelity_swaps": Metric(real.swaps, "swaps"),
        "fidelity_around": Metric(statistics.fmean(known.around_ms.values()), "ms"),
        "fidelity_handover": Metric(known.handover_ms, "ms a batch"),
        "fidelity_cold_slowdown": Metric(known.cold, "times the warm GPU time"),
    }
