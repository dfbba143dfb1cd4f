"""Who shares, who keeps devices of its own, and how many devices that takes: the plan.

Owns the verdicts and their reasons in words. Sharing has to pay: a function is kept apart when the pool would grow by as many devices as the function
takes alone. Decided on the upper end of every run time; the number of devices is also found for the middle and the lower end.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from contracts.units import S, format_bytes, ms
from simulator.measured import Level
from simulator.planning.capacity import Capacity, Tally
from simulator.planning.demand import active_part
from simulator.planning.wanted import LEVELS, Wanted

Verdict = Literal["share", "keep dedicated", "nothing will do"]
_HEAVY = 0.5
_LINGER_NS = 90 * S
"""How long a Knative pod stays after its last request: the stable window, and the grace of 30 s."""


@dataclass(frozen=True, slots=True)
class Running:
    """GPUs that serve a function now: at most, and on average over the time that was looked at."""

    most: float
    mean: float


@dataclass(frozen=True, slots=True)
class Line:
    """One function in the plan. `devices` are its own (none when it shares); `busy` is the part of a device that its busiest step takes.

    `tallies` are of the simulation at each level of the run times, with the devices of the plan; empty where nothing was simulated.
    """

    wanted: Wanted
    verdict: Verdict
    reason: str
    devices: int
    now: Running
    mean_per_s: float
    peak_per_s: float
    busy: float
    tallies: Mapping[Level, Tally]

    @property
    def quota_percent(self) -> float:
        """The part of the time on the SMs of its share that it needs in its busiest step."""
        return 100 * self.peak_per_s * self.wanted.run_ms("high") / 1000

    def percentile_ms(self, level: Level) -> float:
        """The latency of the objective's percentile; nan when there was no request."""
        return self.tallies[level].total.percentile_ms(self.wanted.function.slo.percentile) if self.tallies else float("nan")


@dataclass(frozen=True, slots=True)
class Plan:
    """The answer: devices at each level of the run times, those of the pool among them, and what serves now."""

    lines: tuple[Line, ...]
    devices: Mapping[Level, int]
    pool: Mapping[Level, int]
    now: Running


def make(wanted: Sequence[Wanted], capacity: Capacity, now: Mapping[str, Running], at_most: int, total: Running | None = None) -> Plan:
    """The plan for these functions. `total` is what serves now when that is known for all of them together."""
    found = _Planner(capacity, at_most)
    for one in wanted:
        found.take(one)
    found.part_tight()
    found.part_heavy()
    found.part_useless()
    most = found.devices(found.pool) or 0
    pool = {level: _fewest(capacity, found.pool, level, most) for level in LEVELS}
    own = {level: sum(_of_level(capacity, one, level, devices) for one, devices, _ in found.apart.values()) for level in LEVELS}
    kept = sum(round(now[key].most) for key in found.nothing)
    lines = tuple(_line(one.key, found, most, now[one.key]) for one in wanted)
    running = total or Running(sum(line.now.most for line in lines), sum(line.now.mean for line in lines))
    return Plan(lines, {level: pool[level] + own[level] + kept for level in LEVELS}, pool, running)


def running(wanted: Wanted, capacity: Capacity) -> Running:
    """What serves a function now, as far as its document tells: its replicas, or one while it is called if it scales to zero."""
    gpus = wanted.declared.gpus
    if wanted.declared.replicas:
        return Running(wanted.declared.replicas * gpus, wanted.declared.replicas * gpus)
    return Running(gpus, gpus * active_part(capacity.counts(wanted), capacity.demand.step_ns, _LINGER_NS))


class _Planner:
    """What was decided so far: who shares, who has how many devices of its own and why, who cannot be served, and what else is to be said."""

    def __init__(self, capacity: Capacity, at_most: int) -> None:
        self.capacity = capacity
        self.pool: list[Wanted] = []
        self.apart: dict[str, tuple[Wanted, int, str]] = {}
        self.nothing: dict[str, tuple[Wanted, str]] = {}
        self.notes: dict[str, str] = {}
        self._at_most = at_most

    def take(self, one: Wanted) -> None:
        """Into the pool, perhaps with shorter batches, if devices of its own keep its objective; several GPUs to a replica are not shared."""
        gpus, batch = one.declared.gpus, one.function.max_batch
        if gpus > 1:
            self.apart[one.key] = one, gpus * max(1, one.declared.replicas), f"one replica takes {gpus} GPUs"
        elif reason := _never(one, self.capacity):
            self.nothing[one.key] = one, reason
        else:
            tried = [one, *(one.batched(batch >> times) for times in range(1, batch.bit_length()))]
            fitting = next((each for each in tried if self._alone(each) is not None), None)
            if fitting is None:
                self.nothing[one.key] = one, f"even with {self._enough(one)} devices of its own bursts break its {_objective_ms(one):g} ms"
                return
            if fitting is not one:
                self.notes[one.key] = f"batches of at most {fitting.function.max_batch}: with {batch} not even devices of its own would do"
            self.pool.append(fitting)

    def part_tight(self) -> None:
        """Those whose weights may never go: a swap breaks their objective. And those that miss it in the largest pool that could pay."""
        tight = [one for one in self.pool if one.guaranteed and _cold_ms(one, self.capacity) > _objective_ms(one)]
        if tight and len(tight) < len(self.pool) and self._pays_apart(tight):
            for one in tight:
                times = f"swap ({_swap_ms(one, self.capacity):.0f} ms) and run ({one.run_ms('high'):.0f} ms)"
                self._set_apart(one, f"its weights have to stay on the device: {times} break its {_objective_ms(one):g} ms")
        while self.pool and self.devices(self.pool) is None:
            most = self._bound(self.pool)
            tallies = self.capacity.tallies(self.pool, most, "high")
            for one in [one for one in self.pool if not tallies[one.key].kept(one)]:
                self._set_apart(one, f"beside others it misses its objective even on {most} devices")

    def part_heavy(self) -> None:
        """Those that fill devices: the busiest first, until sharing pays."""
        for one in sorted(self.pool, key=lambda one: -_busy(one, self.capacity)):
            busy = _busy(one, self.capacity)
            if busy < _HEAVY or not self._pays_apart([one]):
                return
            self._set_apart(one, f"it fills {busy:.2f} of {self._own([one])} of its own; the pool would grow by as many")

    def part_useless(self) -> None:
        """All that is left, when together they take as many devices as apart."""
        own = self._own(self.pool)
        if self.pool and self.devices(self.pool) == own:
            reason = "there is nothing to share with" if len(self.pool) == 1 else f"together they take as many devices as apart ({own})"
            for one in list(self.pool):
                self._set_apart(one, reason)

    def devices(self, members: Sequence[Wanted]) -> int | None:
        """Devices that these share; None when they need more than they take apart."""
        return self.capacity.fewest(members, "high", self._bound(members))

    def _bound(self, members: Sequence[Wanted]) -> int:
        return min(self._at_most, self._own(members))

    def _pays_apart(self, some: Sequence[Wanted]) -> bool:
        """Whether the pool shrinks by at least what these take with devices of their own."""
        together, rest = self.devices(self.pool), [one for one in self.pool if one not in some]
        if together is None:
            return True
        left = min(together - self._own(some), self._bound(rest))
        return left == 0 if not rest else left > 0 and self.capacity.holds(rest, left, "high")

    def _set_apart(self, one: Wanted, reason: str) -> None:
        self.pool.remove(one)
        self.apart[one.key] = one, self._own([one]), reason

    def _own(self, some: Sequence[Wanted]) -> int:
        """What these take with devices of their own, all of which can be served so."""
        return sum(self._alone(one) or 0 for one in some)

    def _alone(self, one: Wanted) -> int | None:
        """Devices of its own that it needs."""
        return self.capacity.fewest([one], "high", self._enough(one))

    def _enough(self, one: Wanted) -> int:
        """Where four times what its load fills do not help, more do not either."""
        return min(self._at_most, 2 + math.ceil(4 * _busy(one, self.capacity)))


def _never(one: Wanted, capacity: Capacity) -> str:
    """Why no number of such devices serves a function; empty when some may."""
    memory, objective_ms = capacity.machine.memory_bytes, _objective_ms(one)
    if one.known.weight_bytes > memory:
        return f"its weights ({format_bytes(one.known.weight_bytes)}) do not fit in {format_bytes(memory)}: it needs a bigger GPU"
    alone_ms, middle_ms = (one.times[level].run_ms(1, 100) for level in ("high", "mean"))
    if not one.guaranteed or alone_ms <= objective_ms:
        return ""
    hope = ", or more measurements: the middle of the estimate would do" if middle_ms <= objective_ms else ""
    return f"alone on a whole device a request takes up to {alone_ms:.1f} ms, the objective is {objective_ms:g} ms: it needs a faster GPU{hope}"


def _line(key: str, found: _Planner, shared: int, now: Running) -> Line:
    """A function's line; `shared` devices are the pool's."""
    capacity = found.capacity
    tallies: Mapping[Level, Tally] = {}
    verdict: Verdict = "share"
    devices = 0
    if key in found.nothing:
        one, reason = found.nothing[key]
        verdict, devices = "nothing will do", round(now.most)
    elif key in found.apart:
        one, devices, reason = found.apart[key]
        verdict = "keep dedicated"
        if one.declared.gpus == 1:
            tallies = {level: capacity.tallies([one], devices, level)[key] for level in LEVELS}
    else:
        one = next(one for one in found.pool if one.key == key)
        reason = "" if capacity.counts(one).any() else "never called: it takes host memory alone"
        tallies = {level: capacity.tallies(found.pool, shared, level)[key] for level in LEVELS}
    words = "; ".join(part for part in (reason, found.notes.get(key, "")) if part)
    return Line(one, verdict, words, devices, now, capacity.mean_per_s(one), capacity.peak_per_s(one), _busy(one, capacity), tallies)


def _objective_ms(one: Wanted) -> float:
    return ms(one.function.slo.latency_ns)


def _busy(one: Wanted, capacity: Capacity) -> float:
    """Devices that its busiest step keeps busy, batches being as good as they can be."""
    return float(capacity.busy([one], "high").max())


def _swap_ms(one: Wanted, capacity: Capacity) -> float:
    """How long the weights take over a free link."""
    return one.known.weight_bytes / (capacity.machine.link_gb_per_s * 1e6)


def _cold_ms(one: Wanted, capacity: Capacity) -> float:
    """An answer whose weights have to come first, on an idle device: the run goes on behind the copy."""
    run_ms = one.run_ms("high")
    return max(run_ms, _swap_ms(one, capacity) + capacity.machine.hardware.tail * run_ms)


def _fewest(capacity: Capacity, members: Sequence[Wanted], level: Level, at_most: int) -> int:
    """At a lower level of the run times no more than at the upper one."""
    return (capacity.fewest(members, level, at_most, near=at_most) or at_most) if members else 0


def _of_level(capacity: Capacity, one: Wanted, level: Level, devices: int) -> int:
    return devices if one.declared.gpus > 1 else _fewest(capacity, [one], level, devices)
