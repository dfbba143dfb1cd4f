"""One policy on one world: who serves, from the first arrival to the last answer, and what it cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import msgspec

from contracts.errors import InvalidValue
from contracts.units import S
from nodeagent.events import FunctionDeclared, FunctionSpec
from nodeagent.settings import DeviceSpec
from simulator.baselines.fastgshare import FastGShare
from simulator.baselines.hasgpu import HasGpu
from simulator.baselines.keepalive import KeepAlive
from simulator.baselines.knative import Knative
from simulator.baselines.lalb import SKIP_LIMIT, Lalb, LoadBalancing
from simulator.baselines.torpor import Torpor
from simulator.engine import Engine
from simulator.front import Fronts
from simulator.latency import Draws, RunTimes
from simulator.node import SimulatedNode
from simulator.pool import Model, Pool, Scheduler, Swapping
from simulator.record import Record
from simulator.scenario import Scenario, World
from simulator.shared_gpu import Scaler, SharedGpus
from simulator.timeline import Timeline

Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a policy did with a world. `reserved_s`: GPU seconds that somebody held until the last answer, idle or not; `busy_s`: those with work.

    A part of a GPU's SMs counts as that part of a GPU.
    """

    records: Mapping[str, Record]
    reserved_s: float
    busy_s: float
    loads: int
    gpus: int
    facts: Mapping[str, float] = field(default_factory=dict)


def simulate(policy: str, world: World, progress: Progress = lambda _: None, timeline: Timeline | None = None) -> Outcome:
    """Plays a world under a policy, as `check` knows it. Only Sluice's own draw a timeline."""
    check((policy,))
    play = POLICIES[policy]
    return play(world, progress) if timeline is None or play is not _sluice else _sluice(world, progress, timeline)


def check(policies: Iterable[str]) -> None:
    """InvalidValue names a policy that there is not, and lists those that there are."""
    for policy in policies:
        if policy not in POLICIES:
            raise InvalidValue(f"must be one of {', '.join(POLICIES)}", key="policies", value=policy)


def _sluice(world: World, progress: Progress, timeline: Timeline | None = None) -> Outcome:
    """Sluice: the node agents' own state, functions dealt out to the nodes in turn, lanes up before the load begins."""
    scenario, devices = world.scenario, world.scenario.devices
    engine = Engine()
    specs = [
        DeviceSpec(f"gpu:{n}", world.device_bytes, int(devices.link_gb_per_s * 1e9), f"link:{n // devices.per_link}") for n in range(devices.count)
    ]
    times = RunTimes(world.latencies)
    drawn = _draws(world)
    peer_bytes_per_s = int(devices.peer_gb_per_s * 1e9)
    nodes = [
        SimulatedNode(engine, specs, drawn, scenario.hardware, timeline=timeline, beside=world.neighbours, peer_bytes_per_s=peer_bytes_per_s)
        for _ in range(devices.nodes)
    ]
    where = [nodes[number % len(nodes)] for number in range(len(world.functions))]
    fronts = Fronts(engine, world.functions, where, world.around_ns)
    for function, weight_bytes, node in zip(world.functions, world.weight_bytes, where, strict=True):
        run_ns = times.run_ns(function.key, 1, 100)
        node.handle(FunctionDeclared(FunctionSpec(function.key, function.cls, function.share, function.slo, weight_bytes, run_ns)))
    engine.settle(_START_NS)
    engine.at(_START_NS + int(scenario.warm_up_s * S), fronts.forget, world.allowed)
    engine.run(world.arrivals, fronts.arrive, progress, start_ns=_START_NS)
    all_devices = [device for node in nodes for device in node.state.devices.values()]
    accounts = [function.account for node in nodes for function in node.state.functions.values()]
    return Outcome(
        fronts.records,
        reserved_s=_held_s(world, max(lane.since_ns for node in nodes for lane in node.state.lanes.values())),
        busy_s=sum(account.charged_ns * account.share.sm_percent for account in accounts) / 100 / S,
        loads=sum(device.swaps for device in all_devices),
        gpus=devices.total,
        facts={"swapped_gb": sum(device.swapped_bytes for device in all_devices) / 1e9},
    )


def _whole_gpus(scheduler: Callable[[], Scheduler], *, swapping: bool = False) -> Callable[[World, Progress], Outcome]:
    """Devices that run one request at a time and keep what they have loaded, by its framework or by swapping."""

    def play(world: World, progress: Progress) -> Outcome:
        scenario, engine = world.scenario, Engine()
        pool = Pool(
            engine, _models(world), scenario.devices.total, world.device_bytes, scheduler(), _swapping(scenario) if swapping else None, _draws(world)
        )
        pool.preload()
        engine.at(_START_NS + int(scenario.warm_up_s * S), pool.forget)
        engine.run(world.arrivals, pool.arrive, progress, start_ns=_START_NS)
        return Outcome(
            {function.key: record for function, record in zip(world.functions, pool.records, strict=True)},
            reserved_s=_held_s(world, pool.last_ns),
            busy_s=sum(device.busy_ns for device in pool.devices) / S,
            loads=sum(device.loads for device in pool.devices),
            gpus=scenario.devices.total,
        )

    return play


def _swapping(scenario: Scenario) -> Swapping:
    devices = scenario.devices
    return Swapping(
        int(devices.link_gb_per_s * 1e9),
        per_link=devices.per_link,
        per_node=devices.count,
        tail=scenario.hardware.tail,
        peer_bytes_per_s=int(devices.peer_gb_per_s * 1e9),
    )


def _held_s(world: World, last_ns: int) -> float:
    """GPU seconds of all devices, from the beginning of the load until its end or the last answer."""
    return max(world.arrivals.span_ns, last_ns - _START_NS) / S * world.scenario.devices.total


def _rectangles(scaler: Callable[[int], Scaler], *, sharing: bool) -> Callable[[World, Progress], Outcome]:
    """Pods with a part of a GPU each. What is paid for is the area of the pods; that whole GPUs are in use for it is said beside it."""

    def play(world: World, progress: Progress) -> Outcome:
        scenario, engine = world.scenario, Engine()
        engine.settle(_START_NS)
        memory = [world.device_bytes] * scenario.devices.total
        times, pod_start_ns = RunTimes(world.latencies), world.cluster.pod_start_ns
        gpus = SharedGpus(engine, _models(world), times, memory, scaler(len(memory)), pod_start_ns=pod_start_ns, sharing=sharing, drawn=_draws(world))
        gpus.start()
        engine.at(_START_NS + int(scenario.warm_up_s * S), gpus.forget)
        engine.at(_START_NS + world.arrivals.span_ns, gpus.stop)
        engine.run(world.arrivals, gpus.arrive, progress, start_ns=_START_NS)
        return Outcome(
            {function.key: record for function, record in zip(world.functions, gpus.records, strict=True)},
            reserved_s=gpus.area_ns / S,
            busy_s=gpus.busy_ns / S,
            loads=gpus.starts,
            gpus=gpus.most_used,
            facts={"gpu_seconds_whole": gpus.whole_ns / S},
        )

    return play


def _time_sharing(world: World, progress: Progress) -> Outcome:
    """Sluice without shares of the SMs: whoever runs has them all."""
    whole = tuple(msgspec.structs.replace(function, share=msgspec.structs.replace(function.share, sm_percent=100)) for function in world.functions)
    return _sluice(dataclasses.replace(world, functions=whole), progress)


def _tuned_knative(world: World, progress: Progress) -> Outcome:
    """The KPA with the settings that keep most functions in their objective, and of those the ones that hold the fewest GPU seconds."""
    outcomes: list[tuple[int, int, float, int, Outcome]] = []
    for total in _TUNED_TOTALS:
        for utilisation in _TUNED_UTILISATIONS:
            spec = msgspec.structs.replace(world.scenario.kpa, total=total, target=total * utilisation)
            outcome = _knative(dataclasses.replace(world, scenario=msgspec.structs.replace(world.scenario, kpa=spec)), lambda _: None)
            kept = sum(outcome.records[function.key].within_slo(function.slo.percentile) for function in world.functions)
            late = sum(record.late for record in outcome.records.values())
            outcomes.append(
                (-kept, late, outcome.reserved_s, len(outcomes), dataclasses.replace(outcome, facts={"total": total, "target": spec.target}))
            )
            progress(len(world.arrivals) * len(outcomes) // (len(_TUNED_TOTALS) * len(_TUNED_UTILISATIONS)))
    return min(outcomes)[-1]


def _knative(world: World, progress: Progress) -> Outcome:
    """A whole GPU for each pod, under the KPA as the scenario sets it."""
    engine = Engine()
    engine.settle(_START_NS)
    knative = Knative(engine, _models(world), world.scenario.kpa, world.cluster, _draws(world))
    knative.start()
    engine.at(_START_NS + int(world.scenario.warm_up_s * S), knative.forget)
    engine.at(_START_NS + world.arrivals.span_ns, knative.stop)
    engine.run(world.arrivals, knative.arrive, progress, start_ns=_START_NS)
    return Outcome(
        {function.key: revision.record for function, revision in zip(world.functions, knative.revisions, strict=True)},
        reserved_s=knative.gpus.reserved_ns / S,
        busy_s=sum(revision.busy_ns for revision in knative.revisions) / S,
        loads=0,
        gpus=knative.gpus.most_used,
    )


_TUNED_TOTALS = (1.0, 2.0, 4.0, 8.0, 16.0)
_TUNED_UTILISATIONS = (0.5, 0.7, 0.9)
_START_NS = 10 * S
"""When the load begins: lanes are up by then."""

POLICIES: Mapping[str, Callable[[World, Progress], Outcome]] = {
    "sluice": _sluice,
    "time-sharing": _time_sharing,
    "torpor": _whole_gpus(Torpor, swapping=True),
    "lalb": _whole_gpus(Lalb),
    "lalb-o3": _whole_gpus(lambda: Lalb(SKIP_LIMIT)),
    "load-balancing": _whole_gpus(LoadBalancing),
    "keep-alive": _whole_gpus(KeepAlive),
    "fast-gshare": _rectangles(FastGShare, sharing=True),
    "has-gpu": _rectangles(HasGpu, sharing=False),
    "knative": _knative,
    "knative-tuned": _tuned_knative,
}


def _models(world: World) -> list[Model]:
    times = RunTimes(world.latencies)
    around = world.around_ns or [0] * len(world.functions)
    return [
        Model(
            function.key,
            times.run_ns(function.key, 1, 100),
            weight_bytes,
            load_ns,
            function.slo.latency_ns,
            function.slo.percentile,
            function.timeout_ns,
            function.max_batch,
            around_ns,
        )
        for function, weight_bytes, load_ns, around_ns in zip(world.functions, world.weight_bytes, world.load_ns, around, strict=True)
    ]


def _draws(world: World) -> Draws:
    """The time of each batch, from the same seed for all policies."""
    return Draws(world.latencies, world.seed)
