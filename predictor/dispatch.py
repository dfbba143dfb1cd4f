"""From one request's tensors to its answer: admission, the function's queue, the batch, the outcome.

Owns the functions of this predictor and every request under way. Runs on one event loop without a task of its own: a request is carried by the
callbacks of the agent's channel and two timers. Knows no HTTP and no JSON.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import Mapping, Sequence

import msgspec

from contracts.artifact import Signature, Text
from contracts.errors import DeadlineExceeded, ExecutionError, InvalidTensor, NotFound, Refused, SluiceError, Unavailable
from contracts.units import MS, S
from contracts.wire import Answer, FunctionInfo
from predictor.admission import Estimates
from predictor.agent_client import AgentClient, Batch
from predictor.batching import QUEUED_BATCHES, Batcher, Waiting, joint
from predictor.metrics import FunctionMetrics, Metrics
from predictor.segment import Array, Placement
from predictor.tensors import NUMPY
from predictor.text import Tokenizers

_RETRY_MS = 1000


class Outcome(msgspec.Struct, frozen=True):
    """How a request was answered. `batch` is unique in this process; the request's rows are `row` to `row + its rows` of the batch's `rows`."""

    queue_ns: int
    swap_ns: int
    run_ns: int
    cold: bool
    device: str
    batch: int
    row: int
    rows: int


class Ticket:
    """One accepted request. Await `future` for its Outcome, read `outputs`, and hand it to `Dispatcher.finish` whatever happened."""

    __slots__ = ("arrival_ns", "batch", "deadline_ns", "future", "id", "outputs", "placement", "rows", "served", "slo_deadline_ns", "timer")

    def __init__(self, id_: int, served: Served, rows: int, placement: Placement, arrival_ns: int, deadline_ns: int) -> None:
        self.id = id_
        self.served = served
        self.rows = rows
        self.placement = placement
        self.arrival_ns = arrival_ns
        self.slo_deadline_ns = arrival_ns + served.info.function.slo.latency_ns
        self.deadline_ns = deadline_ns
        self.future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self.timer: asyncio.TimerHandle | None = None
        self.batch: _Run | None = None
        self.outputs: dict[str, Array] = {}


class _Run(Batch):
    """A batch that remembers whose requests it holds."""

    __slots__ = ("served", "tickets")
    served: Served
    tickets: Sequence[Ticket]


class Served:
    """One function of this predictor and what is known of it.

    `loaded` is what clients asked of this predictor (`Dispatcher.load`, `unload`); whether the node can run it is in `info`. `changed` is set, and
    replaced, when either may have become different.
    """

    def __init__(self, info: FunctionInfo, metrics: Metrics) -> None:
        self.info = info
        self.key = info.function.key
        self.batcher = Batcher(info.function.max_batch, QUEUED_BATCHES * info.function.max_batch)
        self.estimates = Estimates()
        self.tickets: dict[int, Ticket] = {}
        self.metrics = FunctionMetrics(metrics, self.key, lambda: len(self.tickets))
        self.wake: asyncio.TimerHandle | None = None
        self.wake_ns: int | None = None
        self.loaded = True
        self.changed = asyncio.Event()

    @property
    def text(self) -> Text | None:
        """The text input that it takes."""
        return None if self.info.signature is None else self.info.signature.text

    def tell(self) -> None:
        """Wakes whoever waits for a change."""
        self.changed.set()
        self.changed = asyncio.Event()

    def update(self, info: FunctionInfo) -> None:
        """The function as it is from now on."""
        self.info = info
        self.tell()
        alone = info.signature is not None and not info.signature.batchable
        self.batcher.max_batch = 1 if alone else info.function.max_batch
        self.batcher.max_rows = QUEUED_BATCHES * info.function.max_batch


class Dispatcher:
    """All functions of one predictor. It listens to the AgentClient that it owns."""

    def __init__(self, agent_path: str, segment_bytes: int, metrics: Metrics) -> None:
        self._metrics = metrics
        self._loop = asyncio.get_running_loop()
        self._ids = itertools.count(1)
        self._served: dict[str, Served] = {}
        self._names: dict[str, str] = {}
        self._open = 0
        self.draining = False
        self.tokenizers = Tokenizers()
        self.client = AgentClient(agent_path, segment_bytes, self)
        metrics.watch_segment(lambda: self.client.segment.used_bytes)

    @property
    def names(self) -> Mapping[str, str]:
        """Model name in a URL -> function key."""
        return self._names

    @property
    def busy(self) -> bool:
        """Whether any request waits for its answer."""
        return self._open > 0

    def ready(self, name: str) -> bool:
        """Whether a request for this model would be run at once."""
        key = self._names.get(name)
        return key is not None and not self.unready(self._served[key])

    def find(self, name: str) -> Served:
        """The function behind a model name in a URL, or NotFound; Unavailable while only the agent could say whether there is one."""
        key = self._names.get(name)
        if key is None and not self.client.connected:
            raise Unavailable(f"whether there is a model {name!r} is not known yet: the server waits for its node agent", retry_after_ms=_RETRY_MS)
        if key is None:
            raise NotFound(f"there is no model {name!r} here")
        return self._served[key]

    def signature(self, served: Served) -> Signature:
        """What the function takes, if it takes requests now (a lost agent's functions do, for a while); Unavailable otherwise."""
        why = self.unready(served)
        if served.info.signature is not None and (not why or (served.loaded and self.client.awaited(served.key))):
            return served.info.signature
        raise Unavailable(f"{served.key} {why}", retry_after_ms=_RETRY_MS)

    def unready(self, served: Served) -> str:
        """Why a request for this function would not be run at once; "" when it would."""
        if not served.loaded:
            return "is unloaded here"
        if self.client.live(served.key):
            return ""
        if served.info.state == "failed":
            return f"cannot be served: {served.info.reason}"
        return "is loading" if self.client.connected else "waits for its node agent"

    def unload(self, name: str) -> None:
        """Takes a model out of this predictor: what was accepted is answered, what comes is Unavailable. Again is no error; NotFound is."""
        served = self.find(name)
        served.loaded = False
        served.tell()

    async def load(self, name: str, timeout_ns: int) -> None:
        """Brings a model back, and returns when it would run at once; Unavailable says why it cannot, or not within `timeout_ns`; NotFound."""
        served = self.find(name)
        served.loaded = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_ns / S):
                while self.unready(served) and self._may_load(served):
                    await served.changed.wait()
        if why := self.unready(self.find(name)):
            raise Unavailable(f"{served.key} {why}", retry_after_ms=_RETRY_MS)

    def _may_load(self, served: Served) -> bool:
        return served.loaded and served.info.state != "failed" and self._served.get(served.key) is served and not self.draining

    def drain(self) -> None:
        """The process is on its way down: what comes is still served, but nobody waits for a model any more."""
        self.draining = True
        for served in self._served.values():
            served.tell()

    def submit(self, served: Served, signature: Signature, inputs: Mapping[str, Array], timeout_ns: int | None) -> Ticket:
        """Accepts a request or says why not: InvalidTensor, Refused. `timeout_ns` can only shorten the function's own."""
        function = served.info.function
        dtypes = {spec.name: spec.dtype for spec in signature.inputs}
        sizes = signature.bind({name: (dtypes.get(name, ""), array.shape) for name, array in inputs.items()})
        rows = sizes.get("batch", 1) if signature.batchable else 1
        if rows > function.max_batch:
            raise InvalidTensor(f"{function.name} takes at most {function.max_batch} rows a request", key="rows", value=rows)
        now_ns = time.monotonic_ns()
        deadline_ns = now_ns + min(function.timeout_ns, timeout_ns or function.timeout_ns)
        self._admit(served, rows, now_ns, deadline_ns)
        placement = self.client.place([(spec, inputs[spec.name]) for spec in signature.inputs], signature.output_shapes(sizes))
        if placement is None:
            raise _refused(served, "the predictor's shared memory is full")
        ticket = Ticket(next(self._ids), served, rows, placement, now_ns, deadline_ns)
        dims = joint(sizes, signature.padded) if signature.batchable else ticket.id
        hurry_ns = served.estimates.hurry_ns(now_ns, ticket.slo_deadline_ns, deadline_ns)
        accepted = served.batcher.add(Waiting(ticket.id, rows, dims, hurry_ns))
        assert accepted, "admission has looked"
        served.tickets[ticket.id] = ticket
        self._open += 1
        ticket.timer = self._loop.call_later((deadline_ns - now_ns) / S, self._on_deadline, ticket)
        self._dispatch(served, now_ns)
        return ticket

    def finish(self, ticket: Ticket) -> None:
        """The caller has what it wanted, or gave up: free the memory that nobody writes any more, cancel what nobody needs. Once a ticket."""
        served = ticket.served
        del served.tickets[ticket.id]
        self._open -= 1
        if ticket.timer is not None:
            ticket.timer.cancel()
        ticket.outputs.clear()
        if ticket.batch is None:
            served.batcher.remove(ticket.id)
            self.client.release(ticket.placement)
        elif not any(other.id in served.tickets for other in ticket.batch.tickets):
            self.client.cancel(ticket.batch)

    def on_function(self, info: FunctionInfo) -> None:
        """Listener of the AgentClient: a function appeared or changed."""
        served = self._served.get(info.function.key)
        if served is None:
            served = self._served[info.function.key] = Served(info, self._metrics)
            self._names[self._free_name(info)] = served.key
        before = served.text
        served.update(info)
        if served.text is not None:
            with contextlib.suppress(Unavailable):
                self.tokenizers.prepare(served.text)
        self._forget(before)
        if self.client.live(served.key):
            self._dispatch(served, time.monotonic_ns())
        elif not self.client.awaited(served.key):
            self._empty(served, Unavailable(f"{served.key} cannot be served now ({info.state})", retry_after_ms=_RETRY_MS))

    def on_gone(self, key: str) -> None:
        """Listener of the AgentClient: a function is gone. What runs is still answered."""
        served = self._served.pop(key)
        self._names = {name: other for name, other in self._names.items() if other != key}
        self._empty(served, NotFound(f"the function {key} was removed"))
        served.tell()
        served.metrics.forget()
        self._forget(served.text)

    def on_tokenizer(self, name: str, fd: int) -> None:
        """Listener of the AgentClient: a tokenizer, before the function that names it."""
        self.tokenizers.add(name, fd)

    def on_retry(self, function: str) -> None:
        """Listener of the AgentClient: a batch went to a new agent."""
        if function in self._served:
            self._served[function].metrics.retries.inc()

    def _forget(self, text: Text | None) -> None:
        """Lets go of a tokenizer that no function names any more."""
        if text is not None and all(served.text is None or served.text.tokenizer != text.tokenizer for served in self._served.values()):
            self.tokenizers.forget(text.tokenizer)

    def _free_name(self, info: FunctionInfo) -> str:
        """The function's name; where another namespace has taken it, `namespace.name`."""
        function = info.function
        return function.name if function.name not in self._names else f"{function.namespace}.{function.name}"

    def _admit(self, served: Served, rows: int, now_ns: int, deadline_ns: int) -> None:
        batcher, estimates = served.batcher, served.estimates
        if batcher.rows + rows > batcher.max_rows:
            raise _refused(served, f"{batcher.rows} rows wait already, {batcher.max_rows} are allowed")
        late_ms = estimates.retry_after_ms(now_ns, deadline_ns, rows, batcher.rows, batcher.max_batch)
        if late_ms:
            raise _refused(served, f"the answer would come about {late_ms} ms after the deadline", late_ms)

    def _dispatch(self, served: Served, now_ns: int) -> None:
        """Sends what the queue gives up now, and sets the alarm for the rest."""
        if not self.client.live(served.key):
            return
        for ids in served.batcher.take(now_ns):
            self._launch(served, [served.tickets[id_] for id_ in ids])
        wake_ns = served.batcher.wake_ns()
        if wake_ns == served.wake_ns:
            return
        if served.wake is not None:
            served.wake.cancel()
        served.wake_ns = wake_ns
        served.wake = None if wake_ns is None else self._loop.call_later(max(wake_ns - now_ns, MS) / S, self._on_wake, served)

    def _launch(self, served: Served, tickets: list[Ticket]) -> None:
        run = _Run(
            served.key,
            [ticket.placement for ticket in tickets],
            [ticket.rows for ticket in tickets],
            min(ticket.slo_deadline_ns for ticket in tickets),
            max(ticket.deadline_ns for ticket in tickets),
            self._on_done,
        )
        run.served, run.tickets = served, tickets
        for ticket in tickets:
            ticket.batch = run
        served.metrics.rows.observe(sum(run.rows))
        self.client.submit(run)

    def _on_wake(self, served: Served) -> None:
        served.wake_ns = None
        self._dispatch(served, time.monotonic_ns())

    def _on_deadline(self, ticket: Ticket) -> None:
        if not ticket.future.done():
            ticket.future.set_exception(DeadlineExceeded("the deadline passed before the answer was ready"))

    def _on_done(self, batch: Batch, outcome: Answer | SluiceError) -> None:
        """The one outcome of a batch, for each of its requests."""
        assert isinstance(batch, _Run)
        served, now_ns = batch.served, time.monotonic_ns()
        served.batcher.returned(sum(batch.rows))
        waiting = []
        for ticket in batch.tickets:
            ticket.batch = None
            if ticket.id not in served.tickets:
                self.client.release(ticket.placement)
            elif not ticket.future.done():
                waiting.append(ticket)
        if isinstance(outcome, Answer):
            served.estimates.observe(batch.submitted_ns, now_ns, outcome.swap_ns + outcome.run_ns)
            served.metrics.ran(sum(batch.rows), outcome.run_ns)
            self._answer(batch, outcome)
        elif isinstance(outcome, ExecutionError | InvalidTensor) and len(batch.tickets) > 1:  # by one of them: the others are to be answered
            for ticket in waiting:
                served.batcher.launched(ticket.rows)
                self._launch(served, [ticket])
        else:
            for ticket in waiting:
                _fail(ticket, outcome)
        self._dispatch(served, now_ns)

    def _answer(self, batch: _Run, answer: Answer) -> None:
        row, rows = 0, sum(batch.rows)
        for ticket in batch.tickets:
            if ticket.id in batch.served.tickets and not ticket.future.done():
                queue_ns = batch.submitted_ns - ticket.arrival_ns + answer.queue_ns
                segment = ticket.placement.segment
                ticket.outputs = {ref.name: segment.view(ref, NUMPY[ref.dtype]) for ref in ticket.placement.outputs}
                outcome = Outcome(queue_ns, answer.swap_ns, answer.run_ns, answer.cold, answer.device, batch.id, row, rows)
                ticket.future.set_result(outcome)
                batch.served.metrics.answered(ticket.rows, queue_ns, answer.swap_ns, answer.run_ns)
            row += ticket.rows

    def _empty(self, served: Served, error: SluiceError) -> None:
        for id_ in served.batcher.drain():
            _fail(served.tickets[id_], error)


def _fail(ticket: Ticket, error: SluiceError) -> None:
    if not ticket.future.done():
        ticket.future.set_exception(type(error)(error.message, retry_after_ms=error.retry_after_ms))


def _refused(served: Served, why: str, retry_after_ms: int = 0) -> Refused:
    served.metrics.refusals.inc()
    return Refused(f"{served.info.function.name}: {why}", retry_after_ms=retry_after_ms or max(1, served.estimates.service_ns // MS))
