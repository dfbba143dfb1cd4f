"""Scenario files: which devices, functions and loads are simulated under which policies. Read and checked once; every error names its key.

Owns the YAML schema, and what a seed makes of it: the functions, their run times and their arrivals, the same for all policies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import yaml
from msgspec import Meta

from contracts.errors import InvalidArtifact, InvalidValue, NotFound, SluiceError
from contracts.functions import Function, FunctionClass, ModelFormat, ModelRef, Share, Slo
from contracts.units import MS, WHOLE_QUOTA_BP, S, parse_bytes
from simulator.arrivals import Arrivals, of_many
from simulator.baselines.knative import Cluster
from simulator.baselines.kpa import Spec
from simulator.generators import bursty, diurnal, poisson
from simulator.latency import Latency, Law, tables
from simulator.measured import Profiles, Scaled
from simulator.neighbours import Neighbours
from simulator.node import Hardware
from simulator.traces import read

Positive = Annotated[float, Meta(gt=0)]
Percent = Annotated[float, Meta(gt=0, le=100)]
Count = Annotated[int, Meta(ge=1)]
_FILES = ("table", "trace", "profile", "estimator", "interference")
_PATTERNS = {"poisson": poisson, "bursty": bursty, "diurnal": diurnal}


class _Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A part of the file: a key that is not known is an error."""


class Devices(_Part, frozen=True):
    """`count` devices on each of `nodes`; `per_link` of them share a link to the host of `link_gb_per_s`.

    `peer_gb_per_s` is the speed between any two devices of a node, each way (NVLink; 0: none), for policies that use it.
    """

    count: Count = 1
    nodes: Count = 1
    memory: str = "32Gi"
    link_gb_per_s: Positive = 12.0
    per_link: Count = 1
    peer_gb_per_s: Annotated[float, Meta(ge=0)] = 0.0
    dollars_per_hour: Annotated[float, Meta(ge=0)] = 0.0

    @property
    def total(self) -> int:
        """Devices of all nodes."""
        return self.count * self.nodes


class Times(_Part, frozen=True):
    """A law (`fixed_ms`, `row_ms`, `needs_sm`), a `table`, or a `profile`; of the two files the functions take all `models`, or these, in turn.

    A profile is of one `device`, and may be read through an `estimator`. `scale`: of another place, where all takes so many times as long.
    """

    fixed_ms: Annotated[float, Meta(ge=0)] = 0.0
    row_ms: Annotated[float, Meta(ge=0)] = 0.0
    needs_sm: Percent = 100.0
    table: str = ""
    profile: str = ""
    estimator: str = ""
    device: str = ""
    models: list[str] = []
    scale: Positive = 1.0


class Load(_Part, frozen=True):
    """Synthetic: `per_minute` requests of each function (or from a range), in a `pattern`; or the busiest functions of a `trace`.

    A trace may be cut (`from_s`), run at another `speed`, and thinned or multiplied (`rate`).
    """

    per_minute: Positive | Annotated[list[Positive], Meta(min_length=2, max_length=2)] | None = None
    pattern: str = "poisson"
    trace: str = ""
    from_s: Annotated[float, Meta(ge=0)] = 0.0
    speed: Positive = 1.0
    rate: Positive = 1.0


class Group(_Part, frozen=True):
    """`count` functions that are alike. `load_ms`: what frameworks need to load the model onto a GPU, for policies that do not swap.

    `around_ms`: HTTP, sockets and encoding of one request, if it is not as for all others.
    """

    name: str
    load: Load
    time: Times
    weights: str
    count: Count = 1
    slo_ms: Positive = 1000.0
    percentile: Percent = 98.0
    cls: FunctionClass = msgspec.field(default=FunctionClass.LATENCY_SENSITIVE, name="class")
    max_batch: Count = 8
    timeout_ms: Positive = 30_000.0
    sm_percent: Annotated[int, Meta(ge=1, le=100)] = 100
    quota_percent: Percent | None = None
    load_ms: Annotated[float, Meta(ge=0)] = 3000.0
    around_ms: Annotated[float, Meta(ge=0)] | None = None


class Scenario(_Part, frozen=True):
    """One file. The first `warm_up_s` are simulated but not counted. `interference`: a file that `sluice profile interference` wrote."""

    name: str
    span_s: Positive
    functions: Annotated[list[Group], Meta(min_length=1)]
    devices: Devices = Devices()
    warm_up_s: Annotated[float, Meta(ge=0)] = 0.0
    policies: Annotated[tuple[str, ...], Meta(min_length=1)] = ("sluice",)
    seed: int = 0
    around_ms: Annotated[float, Meta(ge=0)] = 0.0
    hardware: Hardware = Hardware()
    interference: str = ""
    kpa: Spec = Spec()
    pod_start_s: Positive = 15.0


@dataclass(frozen=True, slots=True)
class World:
    """A scenario with a seed: functions by number, as arrivals count them. `load_ns`: of a framework that does not swap.

    `allowed`: requests of a function that may be late, and that may stay without an answer; Sluice's own run raises Lost when there are more.
    """

    scenario: Scenario
    device_bytes: int
    functions: tuple[Function, ...]
    weight_bytes: tuple[int, ...]
    load_ns: tuple[int, ...]
    latencies: Mapping[str, Latency]
    arrivals: Arrivals
    around_ns: tuple[int, ...] = ()
    neighbours: Neighbours | None = None
    seed: int = 0
    allowed: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def cluster(self) -> Cluster:
        """The same GPUs, given to pods."""
        return Cluster(gpus=self.scenario.devices.total, pod_start_ns=int(self.scenario.pod_start_s * S))


def load(path: Path) -> Scenario:
    """The scenario in a YAML file; InvalidArtifact names the file, the key and what is wrong. Paths in it are relative to it."""
    try:
        document = yaml.safe_load(path.read_text("utf-8"))
        return msgspec.convert(_located(document, path.parent), type=Scenario)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, msgspec.ValidationError, SluiceError) as error:
        raise InvalidArtifact(f"is no scenario ({error})", key="scenario", value=str(path)) from None


def build(scenario: Scenario, seed: int) -> World:
    """Functions, run times and arrivals; InvalidValue or InvalidArtifact names what cannot be."""
    chance = np.random.default_rng((scenario.seed, seed))
    span_ns = int((scenario.warm_up_s + scenario.span_s) * S)
    count = sum(group.count for group in scenario.functions)
    functions: list[Function] = []
    latencies: dict[str, Latency] = {}
    models: dict[str, str] = {}
    parts: list[Arrivals] = []
    for group in scenario.functions:
        members = [_function(group, number, _fair_quota_bp(scenario, count)) for number in range(group.count)]
        functions += members
        timed = _latencies(group)
        for number, function in enumerate(members):
            models[function.key], latencies[function.key] = timed[number % len(timed)]
        parts.append(_arrivals(group, [function.key for function in members], span_ns, chance))
    at_ns = [part.at_ns[part.function == number] for part in parts for number in range(len(part.names))]
    each = [group for group in scenario.functions for _ in range(group.count)]
    return World(
        scenario,
        _bytes("devices.memory", scenario.devices.memory),
        tuple(functions),
        tuple(_bytes(f"functions.{group.name}.weights", group.weights) for group in each),
        tuple(int(group.load_ms * MS) for group in each),
        latencies,
        of_many([function.key for function in functions], at_ns, span_ns),
        tuple(int((scenario.around_ms if group.around_ms is None else group.around_ms) * MS) for group in each),
        Neighbours.read(Path(scenario.interference), latencies, models) if scenario.interference else None,
        seed,
    )


def _fair_quota_bp(scenario: Scenario, count: int) -> int:
    """Nine tenths of all time, in equal parts."""
    return max(1, min(WHOLE_QUOTA_BP, scenario.devices.total * WHOLE_QUOTA_BP * 9 // 10 // count))


def _function(group: Group, number: int, fair_bp: int) -> Function:
    quota_bp = fair_bp if group.quota_percent is None else max(1, round(group.quota_percent * 100))
    return Function(
        name=f"{group.name}-{number}" if group.count > 1 else group.name,
        model=ModelRef(ModelFormat.CATALOG, group.name),
        cls=group.cls,
        share=Share(group.sm_percent, quota_bp),
        slo=Slo(int(group.slo_ms * MS), group.percentile),
        max_batch=group.max_batch,
        timeout_ns=int(group.timeout_ms * MS),
    )


_Named = list[tuple[str, Latency]]


def _latencies(group: Group) -> _Named:
    """The models that the functions of the group take in turn."""
    time, key = group.time, f"functions.{group.name}.time"
    chosen = [name for name, value in (("a law", time.fixed_ms + time.row_ms), ("table", time.table), ("profile", time.profile)) if value]
    if len(chosen) != 1:
        raise InvalidValue("needs either a law (fixed_ms, row_ms), a table, or a profile", key=key, value=" and ".join(chosen))
    if (time.estimator or time.device) and not time.profile:
        raise InvalidValue("estimator and device go with a profile", key=key, value=time.estimator or time.device)
    if time.profile:
        found = _of_profile(time, key)
    elif time.table:
        found = _of_table(time, key)
    else:
        found = [(group.name, Law(time.fixed_ms, time.row_ms, time.needs_sm))]
    return found if time.scale == 1 else [(model, Scaled(latency, time.scale)) for model, latency in found]


def _of_table(time: Times, key: str) -> _Named:
    found = tables(Path(time.table))
    for model in time.models:
        if model not in found:
            raise InvalidValue(f"is not in the table {time.table}", key=f"{key}.models", value=model)
    return [(model, found[model]) for model in time.models or sorted(found)]


def _of_profile(time: Times, key: str) -> _Named:
    try:
        profiles = Profiles(Path(time.profile), Path(time.estimator) if time.estimator else None)
        return [(model, profiles.latency(model, time.device or None)) for model in time.models or profiles.functions]
    except (InvalidValue, NotFound) as error:
        raise InvalidValue(error.message, key=f"{key}.profile", value=time.profile) from None


def _arrivals(group: Group, names: Sequence[str], span_ns: int, chance: np.random.Generator) -> Arrivals:
    key, asked = f"functions.{group.name}.load", group.load
    if (asked.per_minute is None) == (not asked.trace):
        raise InvalidValue("needs either per_minute or a trace", key=key, value=asked.trace)
    if asked.trace:
        trace = read(Path(asked.trace), chance).busiest(len(names), names).faster(asked.speed)
        start_ns = int(asked.from_s * S)
        return trace.between(start_ns, min(trace.span_ns, start_ns + span_ns)).at_rate(asked.rate, chance)
    if asked.pattern not in _PATTERNS:
        raise InvalidValue(f"must be one of {', '.join(_PATTERNS)}", key=f"{key}.pattern", value=asked.pattern)
    low, high = asked.per_minute if isinstance(asked.per_minute, list) else (asked.per_minute, asked.per_minute)
    assert low is not None and high is not None
    rates = chance.uniform(low, high, len(names)) / 60
    return of_many(names, [_PATTERNS[asked.pattern](rate, span_ns, chance) for rate in rates], span_ns)


def _located(value: Any, folder: Path) -> Any:
    """The document with its file names made absolute."""
    if isinstance(value, dict):
        return {key: str(folder / found) if key in _FILES and isinstance(found, str) else _located(found, folder) for key, found in value.items()}
    return [_located(found, folder) for found in value] if isinstance(value, list) else value


def _bytes(key: str, text: str) -> int:
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise InvalidValue(str(error), key=key, value=text) from None
