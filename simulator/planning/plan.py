"""Who shares, who keeps devices of its own, and how many devices that takes: the plan.

Owns the verdicts and their reasons in words. Sharing has to pay: a function is kept apart when the pool would grow by as many devices as the function
takes alone. Decided on the upper end of every run time; the number of devices is also found for the middle and the lower end.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
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


@dataclass(slots=True)
class _Groups:
    """What was decided so far: who shares, who has how many devices of its own and why, and who cannot be served."""

    pool: list[Wanted]
    apart: dict[str, tuple[Wanted, int, str]]
    nothing: dict[str, tuple[Wanted, str]]
    notes: dict[str, str]


def make(wanted: Sequence[Wanted], capacity: Capacity, now: Mapping[str, Running], at_most: int, total: Running | None = None) -> Plan:
    """The plan for these functions. `total` is what serves now when that is known for all of them together."""
    found = _sort(wanted, capacity, at_most)
    _part_tight(found, capacity, at_most)
    _part_heavy(found, capacity, at_most)
    _part_useless(found, capacity, at_most)
    pool: dict[Level, int] = {}
    own: dict[Level, int] = {}
    kept = sum(round(now[key].most) for key in found.nothing)
    pool["high"] = _pool(found.pool, capacity, at_most) or 0
    for level in LEVELS:
        pool[level] = _fewest(capacity, found.pool, level, pool["high"])
        own[level] = sum(_of_level(capacity, one, level, devices) for one, devices, _ in found.apart.values())
    lines = tuple(_line(one.key, found, capacity, pool, now) for one in wanted)
    running = total or Running(sum(line.now.most for line in lines), sum(line.now.mean for line in lines))
    return Plan(lines, {level: pool[level] + own[level] + kept for level in LEVELS}, pool, running)


def running(wanted: Wanted, capacity: Capacity) -> Running:
    """What serves a function now, as far as its document tells: its replicas, or one while it is called if it scales to zero."""
    gpus = wanted.declared.gpus
    if wanted.declared.replicas:
        return Running(wanted.declared.replicas * gpus, wanted.declared.replicas * gpus)
    return Running(gpus, gpus * active_part(capacity.counts(wanted), capacity.demand.step_ns, _LINGER_NS))


def swap_ms(wanted: Wanted, capacity: Capacity) -> float:
    """How long the weights take over a free link."""
    return wanted.known.weight_bytes / (capacity.machine.link_gb_per_s * 1e6)


def _sort(wanted: Iterable[Wanted], capacity: Capacity, at_most: int) -> _Groups:
    """Who can be served at all, with which batches; several GPUs to a replica are not shared."""
    found = _Groups([], {}, {}, {})
    for one in wanted:
        if one.declared.gpus > 1:
            devices = one.declared.gpus * max(1, one.declared.replicas)
            found.apart[one.key] = one, devices, f"one replica takes {one.declared.gpus} GPUs"
            continue
        fitting = _fitting(one, capacity, at_most)
        if isinstance(fitting, str):
            found.nothing[one.key] = one, fitting
            continue
        if fitting is not one:
            longest = one.function.max_batch
            found.notes[one.key] = f"batches of at most {fitting.function.max_batch}, since with {longest} not even devices of its own would do"
        found.pool.append(fitting)
    return found


def _fitting(one: Wanted, capacity: Capacity, at_most: int) -> Wanted | str:
    """The function, perhaps with shorter batches, if devices of its own keep its objective; else why none do."""
    memory = capacity.machine.memory_bytes
    if one.known.weight_bytes > memory:
        return f"its weights ({format_bytes(one.known.weight_bytes)}) do not fit in {format_bytes(memory)}: it needs a bigger GPU"
    objective_ms = ms(one.function.slo.latency_ns)
    alone_ms = one.times["high"].run_ms(1, 100)
    if one.guaranteed and alone_ms > objective_ms:
        reason = f"alone on a whole device a request takes up to {alone_ms:.1f} ms, the objective is {objective_ms:g} ms: it needs a faster GPU"
        if one.times["mean"].run_ms(1, 100) <= objective_ms:
            reason += ", or more measurements: the middle of the estimate would do"
        return reason
    batch = one.function.max_batch
    while batch:
        tried = one if batch == one.function.max_batch else one.batched(batch)
        if _alone(capacity, tried, at_most) is not None:
            return tried
        batch //= 2
    return f"not even {at_most} devices of its own keep {objective_ms:g} ms: its bursts are too short and too high, or the objective is too close"


def _part_tight(found: _Groups, capacity: Capacity, at_most: int) -> None:
    """Those whose weights may never go: a swap breaks their objective. And those that miss it in the largest pool that could pay."""
    tight = [one for one in found.pool if one.guaranteed and _cold_ms(one, capacity) > ms(one.function.slo.latency_ns)]
    if tight and len(tight) < len(found.pool) and _pays_apart(tight, found, capacity, at_most):
        for one in tight:
            need = f"swap ({swap_ms(one, capacity):.0f} ms) and run ({one.run_ms('high'):.0f} ms) break its {ms(one.function.slo.latency_ns):g} ms"
            _set_apart(found, one, capacity, at_most, f"its weights have to stay on the device: {need}")
    while found.pool and _pool(found.pool, capacity, at_most) is None:
        most = _apart(found.pool, capacity, at_most)
        tallies = capacity.tallies(found.pool, most, "high")
        for one in [one for one in found.pool if not tallies[one.key].kept(one)]:
            _set_apart(found, one, capacity, at_most, f"beside others it misses its objective even on {most} devices")


def _part_heavy(found: _Groups, capacity: Capacity, at_most: int) -> None:
    """Those that fill devices: the busiest first, until sharing pays."""
    for one in sorted(found.pool, key=lambda one: -_busy(one, capacity)):
        busy = _busy(one, capacity)
        if busy < _HEAVY or not _pays_apart([one], found, capacity, at_most):
            return
        devices = _apart([one], capacity, at_most)
        _set_apart(found, one, capacity, at_most, f"it fills {busy:.2f} of {devices} of its own; the pool would grow by as many")


def _part_useless(found: _Groups, capacity: Capacity, at_most: int) -> None:
    """All that is left, when together they take as many devices as apart."""
    apart = _apart(found.pool, capacity, at_most)
    if found.pool and _pool(found.pool, capacity, at_most) == apart:
        reason = "there is nothing to share with" if len(found.pool) == 1 else f"together they take as many devices as apart ({apart})"
        for one in list(found.pool):
            _set_apart(found, one, capacity, at_most, reason)


def _pays_apart(some: Sequence[Wanted], found: _Groups, capacity: Capacity, at_most: int) -> bool:
    """Whether the pool shrinks by at least what these take with devices of their own."""
    rest = [one for one in found.pool if one not in some]
    together, without = _pool(found.pool, capacity, at_most), _pool(rest, capacity, at_most)
    return together is None or (without is not None and without + _apart(some, capacity, at_most) <= together)


def _set_apart(found: _Groups, one: Wanted, capacity: Capacity, at_most: int, reason: str) -> None:
    found.pool.remove(one)
    found.apart[one.key] = one, _apart([one], capacity, at_most), reason


def _line(key: str, found: _Groups, capacity: Capacity, pool: Mapping[Level, int], now: Mapping[str, Running]) -> Line:
    if key in found.nothing:
        one, reason = found.nothing[key]
        return _told(one, "nothing will do", reason, round(now[key].most), now[key], capacity, {})
    if key in found.apart:
        one, devices, reason = found.apart[key]
        single = one.declared.gpus == 1
        tallies = {level: capacity.tallies([one], devices, level)[key] for level in LEVELS} if single else {}
        return _told(
            one, "keep dedicated", "; ".join([reason, *([found.notes[key]] if key in found.notes else [])]), devices, now[key], capacity, tallies
        )
    one = next(one for one in found.pool if one.key == key)
    tallies = {level: capacity.tallies(found.pool, pool["high"], level)[key] for level in LEVELS}
    reason = found.notes.get(key, "") if capacity.counts(one).any() else "never called: it takes host memory alone"
    return _told(one, "share", reason, 0, now[key], capacity, tallies)


def _told(one: Wanted, verdict: Verdict, reason: str, devices: int, now: Running, capacity: Capacity, tallies: Mapping[Level, Tally]) -> Line:
    return Line(one, verdict, reason, devices, now, capacity.mean_per_s(one), capacity.peak_per_s(one), _busy(one, capacity), tallies)


def _busy(one: Wanted, capacity: Capacity) -> float:
    """Devices that its busiest step keeps busy, batches being as good as they can be."""
    return float(capacity.busy([one], "high").max())


def _cold_ms(one: Wanted, capacity: Capacity) -> float:
    """An answer whose weights have to come first, on an idle device: the run goes on behind the copy."""
    run_ms = one.run_ms("high")
    return max(run_ms, swap_ms(one, capacity) + capacity.machine.hardware.tail * run_ms)


def _alone(capacity: Capacity, one: Wanted, at_most: int) -> int | None:
    """Devices of its own that it needs. Where four times what its load fills do not help, more do not either."""
    return capacity.fewest([one], "high", min(at_most, 2 + math.ceil(4 * _busy(one, capacity))))


def _apart(some: Sequence[Wanted], capacity: Capacity, at_most: int) -> int:
    """What these take with devices of their own, all of which can be served so."""
    return sum(_alone(capacity, one, at_most) or 0 for one in some)


def _pool(members: Sequence[Wanted], capacity: Capacity, at_most: int) -> int | None:
    """Devices that these share; None when they need more than they take apart."""
    return capacity.fewest(members, "high", min(at_most, _apart(members, capacity, at_most)))


def _fewest(capacity: Capacity, members: Sequence[Wanted], level: Level, at_most: int) -> int:
    """At a lower level of the run times no more than at the upper one."""
    return (capacity.fewest(members, level, at_most) or at_most) if members else 0


def _of_level(capacity: Capacity, one: Wanted, level: Level, devices: int) -> int:
    return devices if one.declared.gpus > 1 else _fewest(capacity, [one], level, devices)
