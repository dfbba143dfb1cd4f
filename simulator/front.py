"""The predictors of the simulated world: the real `Batcher` and admission estimates, request by request, before a simulated node.

Owns the requests under way. As in the predictor a request is refused when it cannot be answered in time, waits for company while the deadline leaves
room, and its batch is cut by the same code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from contracts.functions import Function
from contracts.units import MS
from nodeagent import events as ev
from predictor.admission import Estimates
from predictor.batching import QUEUED_BATCHES, Batcher, Waiting
from simulator.engine import Engine
from simulator.node import SimulatedNode
from simulator.record import Record


class _Served:
    __slots__ = ("around_ns", "batcher", "estimates", "function", "key", "node", "record", "slo_ns", "timeout_ns", "wake_ns")

    def __init__(self, function: Function, node: SimulatedNode, around_ns: int) -> None:
        self.function = function
        self.key = function.key
        self.slo_ns = function.slo.latency_ns
        self.timeout_ns = function.timeout_ns
        self.around_ns = around_ns
        self.node = node
        self.record = Record(self.slo_ns)
        self.batcher = Batcher(function.max_batch, QUEUED_BATCHES * function.max_batch)
        self.estimates = Estimates()
        self.wake_ns: int | None = None


class _Run(NamedTuple):
    """A batch on its way through a node."""

    served: _Served
    arrived_ns: list[int]
    submitted_ns: int


class Fronts:
    """All functions of a scenario, each on its node: the listener of those nodes. `around_ns`: HTTP, sockets and encoding of a request of each."""

    def __init__(self, engine: Engine, functions: Sequence[Function], nodes: Sequence[SimulatedNode], around_ns: Sequence[int] = ()) -> None:
        self._engine = engine
        self._served = [_Served(*each) for each in zip(functions, nodes, around_ns or [0] * len(functions), strict=True)]
        self._runs: dict[int, _Run] = {}
        self._arrived: dict[int, int] = {}
        self._last = 0
        for node in set(nodes):
            node.listener = self

    @property
    def records(self) -> Mapping[str, Record]:
        """What each function's requests met."""
        return {served.key: served.record for served in self._served}

    def forget(self, allowed: Mapping[str, tuple[int, int]]) -> None:
        """The warm-up is over: what was recorded until now does not count. From now on, `Record.allow` for these functions."""
        for served in self._served:
            served.record.clear()
            if served.key in allowed:
                served.record.allow(*allowed[served.key])

    def arrive(self, number: int) -> None:
        """A request of the function with this number: one row."""
        served, now_ns = self._served[number], self._engine.now_ns
        batcher = served.batcher
        if not batcher.rows:
            batcher.launched(1)  # nothing waits or runs: as from an empty queue, it leaves at once and alone
            self._submit(served, [now_ns])
            return
        deadline_ns = now_ns + served.timeout_ns
        if batcher.rows + 1 > batcher.max_rows:
            served.record.reject("the predictor's queue is full")
        elif served.estimates.retry_after_ms(now_ns, deadline_ns, 1, batcher.rows, batcher.max_batch):
            served.record.reject("it would come too late")
        else:
            self._last += 1
            self._arrived[self._last] = now_ns
            hurry_ns = served.estimates.hurry_ns(now_ns, now_ns + served.slo_ns, deadline_ns)
            batcher.add(Waiting(self._last, 1, 0, hurry_ns))
            self._dispatch(served)

    def answered(self, answer: ev.Answer) -> None:
        """Listener of the nodes."""
        run, now_ns = self._runs.pop(answer.request), self._engine.now_ns
        served, swap_ns, run_ns = run.served, answer.swap_ns, answer.run_ns
        for arrived_ns in run.arrived_ns:
            total_ns = now_ns - arrived_ns + served.around_ns
            served.record.answer(total_ns, total_ns - swap_ns - run_ns, swap_ns, run_ns, cold=answer.cold)
        served.estimates.observe(run.submitted_ns, now_ns, swap_ns + run_ns)
        self._over(run)

    def rejected(self, reject: ev.Reject) -> None:
        """Listener of the nodes."""
        run = self._runs.pop(reject.request)
        run.served.record.reject(reject.reason.value, len(run.arrived_ns))
        self._over(run)

    def _over(self, run: _Run) -> None:
        """What waits may go now, but not within the node's own step, which still has commands to carry out."""
        served, now_ns = run.served, self._engine.now_ns
        if served.batcher.queued_rows:
            self._engine.at(now_ns, self._returned, run)
        else:
            served.batcher.returned(len(run.arrived_ns))
            served.batcher.take(now_ns)

    def _returned(self, run: _Run) -> None:
        run.served.batcher.returned(len(run.arrived_ns))
        self._dispatch(run.served)

    def _dispatch(self, served: _Served) -> None:
        now_ns = self._engine.now_ns
        for ids in served.batcher.take(now_ns):
            self._submit(served, [self._arrived.pop(id_) for id_ in ids])
        wake_ns = served.batcher.wake_ns()
        if wake_ns is not None and wake_ns != served.wake_ns:
            self._engine.at(max(wake_ns, now_ns + MS), self._wake, served, wake_ns)
        served.wake_ns = wake_ns

    def _submit(self, served: _Served, arrived_ns: list[int]) -> None:
        self._last = number = self._last + 1
        rows = len(arrived_ns)
        self._runs[number] = _Run(served, arrived_ns, self._engine.now_ns)
        slo_ns, deadline_ns = arrived_ns[0] + served.slo_ns, arrived_ns[-1] + served.timeout_ns
        served.node.handle(ev.RequestArrived(number, served.key, rows, rows, slo_ns, deadline_ns))

    def _wake(self, served: _Served, wake_ns: int) -> None:
        if served.wake_ns == wake_ns:
            served.wake_ns = None
            self._dispatch(served)
