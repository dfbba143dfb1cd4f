"""The sweep: measures functions over batch x SM x quota through the real lanes, where it is least certain first.

Owns the order of the measurements and when they end: at an error target, at the budget, or with the grid. Each configuration is visited several times
over the sweep, since the machine's speed moves (`profiler.visits`). What is measured is in the table at once, so that a sweep that was killed goes on
where it ended. It never measures beside other load unless it was told to, and then says so in the data.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Protocol

import msgspec

from contracts.errors import InvalidValue, Refused
from contracts.functions import Function, Share
from models.describe import describe
from models.samples import sample_inputs
from profiler import device as devices
from profiler.device import DeviceFacts
from profiler.measure import Measured, Sampling, cold_ms, measure, reference_ms
from profiler.points import Config, Point, Table
from profiler.quiet import Watch
from profiler.session import Caller, NodeOptions, Session, started
from profiler.visits import Pooled, next_owed, owed, pooled

_TRIES = 3
WHOLE = Share.of(100, 100)


class Planner(Protocol):
    """Says where to measure next."""

    def next(self, measured: Sequence[Pooled], candidates: Sequence[Config]) -> tuple[int, float]:
        """The index of the candidate to measure, and the mean relative error to be expected of the predictions as things stand (0.05 is 5 %)."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a sweep measures, and when it ends.

    When the planner expects no more than `target_error` (None: with the whole grid), or after `budget_s` of measuring, which all functions share.
    `sampling` is what one of a configuration's `visits` takes.
    """

    batches: tuple[int, ...] = (1, 2, 4, 8)
    sm_percents: tuple[int, ...] = (10, 25, 50, 75, 100)
    quota_percents: tuple[float, ...] = (5, 10, 25, 50, 75, 100)
    target_error: float | None = 0.05
    budget_s: float | None = None
    beside_load: bool = False
    seed: int = 1
    sampling: Sampling = field(default_factory=Sampling)
    visits: int = 3

    def __post_init__(self) -> None:
        if not (self.batches and self.sm_percents and self.quota_percents):
            raise InvalidValue("a sweep needs at least one batch size, one SM percentage and one quota")
        for batch in self.batches:
            if not 1 <= batch <= 1024:
                raise InvalidValue("must be from 1 to 1024", key="batch", value=batch)
        if not 1 <= self.visits <= 100:
            raise InvalidValue("must be from 1 to 100", key="visits", value=self.visits)
        for sm, quota in product(self.sm_percents, self.quota_percents):
            Share.of(sm, quota, quota)

    def grid(self, batchable: bool) -> list[Config]:
        """All configurations, sorted; a model that takes one row at a time has batch 1 only."""
        batches = sorted(set(self.batches)) if batchable else [1]
        return [Config(*each) for each in product(batches, sorted(set(self.sm_percents)), sorted(set(self.quota_percents)))]


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a function's sweep is.

    `measured` configurations of `grid`, and the visits `to_come` that are owed to these; `error` is what the planner expects, None before it was
    asked; `point` the latest visit.
    """

    function: str
    measured: int
    grid: int
    to_come: int
    error: float | None
    spent_s: float
    budget_s: float | None
    point: Point | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a function's sweep ended: "target", "budget" or "grid"; configurations that the table now holds of it, and the error last expected."""

    function: str
    reason: str
    measured: int
    error: float | None


@contextmanager
def running(functions: Sequence[Function], node: NodeOptions | Session) -> Iterator[Session]:
    """The session of a sweep: an agent of its own, or one that is there.

    InvalidValue when two functions have one key, or none is given, or for a device that there is not.
    """
    keys = [function.key for function in functions]
    if not keys or len(set(keys)) != len(keys):
        raise InvalidValue("name each function to measure once", key="functions", value=keys)
    if isinstance(node, Session):
        yield node
    else:
        devices.check(node.device)
        with started(node) as session:
            yield session


def sweep(
    functions: Sequence[Function],
    path: Path,
    planner: Callable[[Function, DeviceFacts], Planner],
    plan: Plan | None = None,
    node: NodeOptions | Session | None = None,
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> list[Outcome]:
    """Measures functions and keeps the points in the table at `path`; returns when each has reached its end.

    Refused when something else runs, or another sweep writes the table; InvalidValue for a plan, a table or a device that cannot be; the function's
    own error when it cannot be served. Whatever is raised, what was measured is kept.
    """
    plan, node = plan or Plan(), node or NodeOptions()
    outcomes: list[Outcome] = []
    spent_s = 0.0
    with running(functions, node) as session:
        device, facts = facts_of(session)
        with Table(path, device, facts) as table:
            for done, function in enumerate(functions):
                budget_s = None if plan.budget_s is None else (plan.budget_s - spent_s) / (len(functions) - done)
                one = _Sweep(session, table, device, function, plan, planner(function, table.header.devices[device]), on_progress)
                outcomes.append(one.run(budget_s))
                spent_s += one.spent_s
    return outcomes


def facts_of(session: Session) -> tuple[str, DeviceFacts]:
    """The one device of a session's node, and its facts, measured now; InvalidValue when it has several."""
    status = session.status()
    if len(status.devices) != 1:
        raise InvalidValue("a sweep measures a node with one device", key="devices", value=[each.device for each in status.devices])
    (found,) = status.devices
    return found.device, devices.measure(found.device, found.capacity_bytes, session.threads)


class _Sweep:
    """One function's sweep."""

    def __init__(
        self,
        session: Session,
        table: Table,
        device: str,
        function: Function,
        plan: Plan,
        planner: Planner,
        on_progress: Callable[[Progress], None],
    ) -> None:
        self._session = session
        self._table = table
        self._device = device
        self._function = function
        self._plan = plan
        self._planner = planner
        self._on_progress = on_progress
        self._signature = describe(function.model).signature
        self._grid = plan.grid(self._signature.batchable)
        # Cut from one sample, smaller batches have the same lengths of texts and recordings: only the rows change.
        self._inputs = sample_inputs(function.model, max(config.batch for config in self._grid), plan.seed)
        self._watch = Watch(session, device)
        self._error: float | None = None
        self._callers: dict[int, Caller] = {}
        self._reference_ms = 0.0
        self._begun = time.monotonic()

    @property
    def spent_s(self) -> float:
        """How long it has measured; loading the model does not count."""
        return time.monotonic() - self._begun

    def run(self, budget_s: float | None) -> Outcome:
        """Measures until one of the ends."""
        if not self._plan.beside_load:
            self._watch.require_quiet()
        with self._session.serving(self._function, WHOLE) as self._key:
            self._index = self._session.index(self._function)
            self._begun = time.monotonic()
            try:
                reason = self._measure(budget_s)
            finally:
                self._let_go()
        return Outcome(self._function.key, reason, len(_configs(self._known())), self._error)

    def _measure(self, budget_s: float | None) -> str:
        known = self._known()
        self._swap_ms = known[0].swap_ms if known else self._cold_ms()
        self._reference_ms = reference_ms(self._session, self._caller_for(1), self._key)
        self._tell(budget_s)
        while isinstance(chosen := self._next(budget_s), Config):
            point = self._point(chosen)
            self._table.append(point)
            self._tell(budget_s, point)
        return chosen

    def _next(self, budget_s: float | None) -> Config | str:
        """The configuration to visit now, or why the sweep ends.

        A new one while the budget has room for all of its visits beside those that are owed to others; then rounds of those.
        """
        known, visits = self._known(), self._plan.visits
        to_come = owed(known, visits)
        left_s = math.inf if budget_s is None else budget_s - self.spent_s
        if left_s <= 0:
            return "budget"
        reason = "grid"
        if left := self._open(known):
            usual_s = visits * statistics.fmean(point.duration_s for point in known) if known else 0.0
            if sum(to_come.values()) + usual_s > left_s:
                reason = "budget"
            elif new := self._choose(known, left):
                return new
            else:
                reason = "target"
        return next_owed(known, visits, self._plan.seed) if to_come else reason

    def _choose(self, known: Sequence[Point], left: list[Config]) -> Config | None:
        """The next new configuration; None when the target is reached. The corners come first: between them an estimator need not guess."""
        corner = next((config for config in corners(self._grid) if config in left), None)
        if corner is not None:
            return corner
        index, self._error = self._planner.next(pooled(known), left)
        if self._plan.target_error is not None and self._error <= self._plan.target_error:
            return None
        return left[index]

    def _known(self) -> list[Point]:
        """Visits to this very model, on this device, in this grid, as the table holds them; beside load only if that is allowed now."""
        wanted = set(self._grid)
        return [
            point
            for point in self._table.points
            if point.function == self._function.key
            and point.model_digest == self._index.digest
            and point.device == self._device
            and point.config in wanted
            and (self._plan.beside_load or not point.beside_load)
        ]

    def _open(self, known: Sequence[Point]) -> list[Config]:
        begun = _configs(known)
        return [config for config in self._grid if config not in begun]

    def _point(self, config: Config) -> Point:
        """Visits a configuration; again when something else ran meanwhile, Refused when that does not end."""
        for _ in range(_TRIES):
            started_at, begun = datetime.now(UTC), time.monotonic()
            self._watch.begin()
            measured = measure(self._session, self._caller_for(config.batch), self._key, config, self._plan.sampling)
            before_ms, self._reference_ms = self._reference_ms, reference_ms(self._session, self._caller_for(1), self._key)
            beside = self._watch.end()
            if not beside or self._plan.beside_load:
                point = self._record(config, measured, started_at, time.monotonic() - begun, bool(beside))
                return msgspec.structs.replace(point, reference_ms=(before_ms + self._reference_ms) / 2)
        raise Refused(f"{beside}, also at try {_TRIES}: what was measured before is kept. Go on when nothing else runs, or with --beside-load")

    def _record(self, config: Config, measured: Measured, started_at: datetime, duration_s: float, beside_load: bool) -> Point:
        latency, service = measured.latency, measured.service
        return Point(
            function=self._function.key,
            model_format=self._function.model.format,
            model_source=self._function.model.source,
            model_digest=self._index.digest,
            program_id=self._index.program_id,
            device=self._device,
            batch=config.batch,
            sm_percent=config.sm_percent,
            quota_percent=config.quota_percent,
            samples=measured.samples,
            latency_mean_ms=latency.mean_ms,
            latency_p50_ms=latency.p50_ms,
            latency_p95_ms=latency.p95_ms,
            latency_p99_ms=latency.p99_ms,
            service_mean_ms=service.mean_ms,
            service_p50_ms=service.p50_ms,
            service_p95_ms=service.p95_ms,
            service_p99_ms=service.p99_ms,
            gpu_ms=measured.gpu_ms,
            swap_ms=self._swap_ms,
            device_bytes=self._index.total_bytes,
            duration_s=duration_s,
            started_at=started_at,
            beside_load=beside_load,
            seed=self._plan.seed,
        )

    def _cold_ms(self) -> float:
        with self._session.chilling(self._function) as chill:
            return cold_ms(self._caller_for(1), chill)

    def _caller_for(self, batch: int) -> Caller:
        """The connection that sends batches of this size."""
        if batch not in self._callers:
            inputs = {name: array[:batch] for name, array in self._inputs.items()}
            self._callers[batch] = self._session.caller(self._key, self._signature, inputs)
        return self._callers[batch]

    def _let_go(self) -> None:
        for caller in self._callers.values():
            caller.close()
        self._callers.clear()

    def _tell(self, budget_s: float | None, point: Point | None = None) -> None:
        known = self._known()
        begun = _configs(known)
        to_come = self._plan.visits * len(begun) - sum(min(count, self._plan.visits) for count in begun.values())
        self._on_progress(Progress(self._function.key, len(begun), len(self._grid), to_come, self._error, self.spent_s, budget_s, point))


def _configs(visits: Sequence[Point]) -> Counter[Config]:
    """How often each was visited."""
    return Counter(point.config for point in visits)


def corners(grid: Sequence[Config]) -> list[Config]:
    """Where a sweep begins: the whole device with the smallest and the largest batch, then less of one thing at a time."""
    least = Config(min(c.batch for c in grid), min(c.sm_percent for c in grid), min(c.quota_percent for c in grid))
    most = Config(max(c.batch for c in grid), max(c.sm_percent for c in grid), max(c.quota_percent for c in grid))
    replace = msgspec.structs.replace
    first = replace(most, batch=least.batch)
    wanted = [first, most, replace(first, sm_percent=least.sm_percent), replace(first, quota_percent=least.quota_percent)]
    return list(dict.fromkeys(wanted))
