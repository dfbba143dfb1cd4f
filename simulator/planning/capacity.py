"""How many devices keep the objectives of some functions: simulated with the node agent's own code, and found by bisection.

Owns the trials: which functions go to which node, which spells of the load are played, and when an objective counts as kept. A trial that has only to
tell whether all objectives hold ends as soon as one cannot hold any more, whatever is still to come. Decides nothing about who should share at all
(`simulator.planning.plan`).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from contracts.functions import Function, Share
from contracts.units import MS, WHOLE_QUOTA_BP, S
from simulator.arrivals import of_many
from simulator.latency import Latency
from simulator.measured import Level
from simulator.node import Hardware
from simulator.planning.demand import Counts, Demand, Floats, Times, busiest
from simulator.planning.wanted import Wanted
from simulator.record import Histogram, Lost
from simulator.run import simulate
from simulator.scenario import Devices, Scenario, World

_GUARANTEED_BP = WHOLE_QUOTA_BP * 9 // 10
_FULL = 0.7
_ANY = sys.maxsize
_Allowed = Mapping[str, tuple[int, int]]


class Machine(msgspec.Struct, frozen=True):
    """What devices there are: memory of each in bytes, how many on a node, their links, and what HTTP and sockets add to a request."""

    memory_bytes: int
    per_node: int = 8
    link_gb_per_s: float = 12.0
    per_link: int = 1
    around_ms: float = 0.5
    hardware: Hardware = Hardware()


class Spells(msgspec.Struct, frozen=True):
    """The `count` busiest spells of this length are played, each after a `warm_up_ns` that does not count."""

    length_ns: int = 600 * S
    count: int = 2
    warm_up_ns: int = 60 * S


class Tally:
    """What became of a function's requests in all spells and seeds: `late` are those after the objective, or without an answer."""

    __slots__ = ("late", "requests", "total", "unanswered")

    def __init__(self) -> None:
        self.requests = self.late = self.unanswered = 0
        self.total = Histogram()

    def kept(self, wanted: Wanted) -> bool:
        """Whether the objective held. One late request is forgiven where there are too few to tell a percentile."""
        return self.missed(wanted) <= _may_miss(wanted, self.requests)

    def missed(self, wanted: Wanted) -> int:
        """Requests that count against the objective."""
        return self.late if wanted.guaranteed else self.unanswered


@dataclass(frozen=True, slots=True)
class Job:
    """One node in one spell."""

    world: World


def play(job: Job) -> dict[str, Tally] | None:
    """Simulates a node, in any process; None when more requests missed than its world allows."""
    try:
        outcome = simulate("sluice", job.world)
    except Lost:
        return None
    found = {}
    for key, record in outcome.records.items():
        tally = found[key] = Tally()
        tally.requests, tally.late, tally.unanswered = record.requests, record.late, record.rejected.total()
        tally.total.merge(record.parts["total"])
    return found


_Names = tuple[tuple[str, int], ...]
_Trial = tuple[_Names, int, Level]
Played = Callable[[Iterable[Job]], Iterator[dict[str, Tally] | None]]
"""`play` for each job, in order. Who does not ask for the next one needs no more of them."""


@dataclass(frozen=True, slots=True)
class _Draw:
    """A spell of one seed: when each function is called, from the begin of the warm-up on, and how long it is with that."""

    calls: dict[str, Times]
    span_ns: int
    warm_up_ns: int
    seed: int


class Capacity:
    """Trials on one load, remembered. `players` carries out jobs, in parallel if it can; `said` hears what is tried."""

    def __init__(
        self,
        demand: Demand,
        machine: Machine,
        spells: Spells,
        seeds: int = 1,
        players: Played = lambda jobs: map(play, jobs),
        said: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.demand = demand
        self.machine = machine
        self.spells = spells
        self.seeds = seeds
        self._place = {key: at for at, key in enumerate(demand.keys)}
        self._players = players
        self._said = said
        self._known: dict[_Trial, dict[str, Tally]] = {}
        self._lost: set[_Trial] = set()
        self._fewest: dict[tuple[_Names, Level, int], int | None] = {}

    def fewest(self, members: Sequence[Wanted], level: Level, at_most: int, near: int | None = None) -> int | None:
        """The fewest devices with which every member keeps its objective; None when so many do not. `near`: where to look first."""
        if not members:
            return 0
        asked = _names(members), level, at_most
        if asked not in self._fewest:
            self._fewest[asked] = self._search(members, level, at_most, near)
        return self._fewest[asked]

    def _search(self, members: Sequence[Wanted], level: Level, at_most: int, near: int | None) -> int | None:
        """From a guess in growing steps to where it changes, then by bisection."""
        least = self._least(members, level)
        high = min(at_most, max(least + 1, near or math.ceil(self._load(members, level) / _FULL)))
        low, step = least, 1
        if self.holds(members, high, level):
            while high - least > 1 and self.holds(members, tried := max(least + 1, high - step), level):
                high, step = tried, 2 * step
            low = max(least, high - step)
        else:
            while not self.holds(members, high, level):
                if high == at_most:
                    return None
                low, high = high, min(at_most, high + max(1, high // 2))
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.holds(members, middle, level) else (middle, high)
        return high

    def holds(self, members: Sequence[Wanted], devices: int, level: Level) -> bool:
        """Whether so many devices do."""
        known = _names(members), devices, level
        if known in self._lost:
            return False
        if known not in self._known:
            found = self._play(members, devices, level, ends_early=True)
            if found is None:
                self._lost.add(known)
                return False
            self._known[known] = found
        return all(self._known[known][member.key].kept(member) for member in members)

    def tallies(self, members: Sequence[Wanted], devices: int, level: Level) -> dict[str, Tally]:
        """What the members' requests meet on so many devices."""
        known = _names(members), devices, level
        if known not in self._known:
            found = self._play(members, devices, level, ends_early=False)
            assert found is not None, "nothing was forbidden"
            self._known[known] = found
        return self._known[known]

    def counts(self, member: Wanted) -> Counts:
        """How often it is called in each step."""
        found: Counts = self.demand.counts[self._place[member.key]]
        return found

    def mean_per_s(self, member: Wanted) -> float:
        """Its mean rate."""
        return self.demand.mean_per_s(self._place[member.key])

    def peak_per_s(self, member: Wanted) -> float:
        """The rate of its busiest step."""
        return self.demand.peak_per_s(self._place[member.key])

    def busy(self, members: Iterable[Wanted], level: Level) -> Floats:
        """Devices that these members' calls keep busy in each step, batches being as good as they can be."""
        found = np.zeros(self.demand.counts.shape[1])
        for member in members:
            found += self.counts(member) * (member.work_ms(level) * MS / self.demand.step_ns)
        return found

    def starts(self, members: Iterable[Wanted]) -> list[int]:
        """When the spells that are played begin (ns): those in which these members have most to do."""
        demand = self.demand
        return busiest(self.busy(members, "mean"), demand.span_ns, demand.step_ns, self.spells.length_ns, self.spells.count)

    def _load(self, members: Sequence[Wanted], level: Level) -> float:
        """Devices kept busy on average in the busiest spell."""
        busy, step_ns = self.busy(members, level), self.demand.step_ns
        steps = max(1, self.spells.length_ns // step_ns)
        return max(float(busy[start // step_ns : start // step_ns + steps].mean()) for start in self.starts(members))

    def _least(self, members: Sequence[Wanted], level: Level) -> int:
        """So many devices cannot do: the work of the busiest spell would not end before the last of its requests is given up."""
        patience_ns = max(max(member.function.timeout_ns, member.function.slo.latency_ns) for member in members)
        spell_ns = min(self.demand.span_ns, self.spells.length_ns)
        return max(0, math.ceil(self._load(members, level) * spell_ns / (spell_ns + patience_ns)) - 1)

    def _play(self, members: Sequence[Wanted], devices: int, level: Level, *, ends_early: bool) -> dict[str, Tally] | None:
        """What becomes of the members' requests; None, if it may end early, when an objective cannot hold any more."""
        self._said(f"{len(members)} functions on {devices} devices, run times: {level}")
        draws = [self._draw(members, seed, start) for seed in range(self.seeds) for start in self.starts(members)]
        # At most: of the warm-up only those count that are answered after it.
        most = {member.key: int(_may_miss(member, sum(len(draw.calls[member.key]) for draw in draws))) for member in members}
        allowed = {member.key: (most[member.key] if member.guaranteed else _ANY, most[member.key]) for member in members} if ends_early else {}
        found = {member.key: Tally() for member in members}
        for part in self._players(self._jobs(members, devices, level, draws, allowed)):
            if part is None:
                return None
            for key, tally in part.items():
                _add(found[key], tally)
            if ends_early and any(found[member.key].missed(member) > most[member.key] for member in members):
                return None
        return found

    def _draw(self, members: Sequence[Wanted], seed: int, start: int) -> _Draw:
        end = min(self.demand.span_ns, start + self.spells.length_ns)
        begin = max(0, start - self.spells.warm_up_ns)
        calls = {member.key: self.demand.calls(seed, self._place[member.key], begin, end) - begin for member in members}
        return _Draw(calls, end - begin, start - begin, seed)

    def _jobs(self, members: Sequence[Wanted], devices: int, level: Level, draws: Iterable[_Draw], allowed: _Allowed) -> Iterator[Job]:
        """Every spell of every seed on every node."""
        for draw in draws:
            for group, count in self._nodes(members, devices, draw.calls, level):
                yield Job(self._world(group, count, level, draw, {member.key: allowed[member.key] for member in group if allowed}))

    def _nodes(self, members: Sequence[Wanted], devices: int, cut: dict[str, Times], level: Level) -> list[tuple[list[Wanted], int]]:
        """Who goes to which node: each function, the busiest first, to the node that is least loaded for its size.

        One function alone has all devices as one node: its predictors on several nodes share its requests among them.
        """
        nodes = -(-devices // self.machine.per_node) if len(members) > 1 else 1
        counts = [devices // nodes + (node < devices % nodes) for node in range(nodes)]
        work = {member.key: member.work_ms(level) * (len(cut[member.key]) + 1) for member in members}
        loads = [0.0] * nodes
        groups: list[list[Wanted]] = [[] for _ in range(nodes)]
        for member in sorted(members, key=lambda member: -work[member.key]):
            node = min(range(nodes), key=lambda node: ((loads[node] + work[member.key]) / counts[node], node))
            loads[node] += work[member.key]
            groups[node].append(member)
        return [(group, count) for group, count in zip(groups, counts, strict=True) if group]

    def _world(self, group: Sequence[Wanted], devices: int, level: Level, draw: _Draw, allowed: _Allowed) -> World:
        """A node and its load."""
        machine, cut, span_ns, warm_up_ns = self.machine, draw.calls, draw.span_ns, draw.warm_up_ns
        layout = Devices(devices, 1, str(machine.memory_bytes), machine.link_gb_per_s, machine.per_link)
        scenario = Scenario(
            name="plan",
            span_s=(span_ns - warm_up_ns) / S,
            functions=[],
            devices=layout,
            warm_up_s=warm_up_ns / S,
            hardware=machine.hardware,
        )
        work_ms = [member.run_ms(level) * len(cut[member.key]) for member in group]
        functions = _shares([member.function for member in group], [each * MS / span_ns for each in work_ms], devices)
        latencies: dict[str, Latency] = {member.key: member.times[level] for member in group}
        arrivals = of_many([member.key for member in group], [cut[member.key] for member in group], span_ns)
        weights = tuple(member.known.weight_bytes for member in group)
        around = (int(machine.around_ms * MS),) * len(group)
        return World(
            scenario, machine.memory_bytes, functions, weights, (0,) * len(group), latencies, arrivals, around, seed=draw.seed, allowed=allowed
        )


def _shares(functions: Sequence[Function], used: Sequence[float], devices: int) -> tuple[Function, ...]:
    """Quotas in proportion to what each uses of the time, and a tenth of it left to borrow; all of it fits the devices."""
    floor = 1 / len(functions)
    parts = [each + floor / 10 for each in used]
    area = sum(part * function.share.sm_percent / 100 for part, function in zip(parts, functions, strict=True))
    scale = devices * _GUARANTEED_BP / area
    quotas = [max(1, min(_GUARANTEED_BP, int(part * scale))) for part in parts]
    return tuple(
        msgspec.structs.replace(function, share=Share(function.share.sm_percent, quota)) for function, quota in zip(functions, quotas, strict=True)
    )


def _may_miss(wanted: Wanted, requests: int) -> float:
    """How many of so many may miss the objective."""
    return max(1.0, requests * (100 - wanted.function.slo.percentile) / 100)


def _names(members: Iterable[Wanted]) -> _Names:
    """What tells one trial's members from another's."""
    return tuple((member.key, member.function.max_batch) for member in members)


def _add(tally: Tally, other: Tally) -> None:
    tally.requests += other.requests
    tally.late += other.late
    tally.unanswered += other.unanswered
    tally.total.merge(other.total)
