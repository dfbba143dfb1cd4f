"""One inference request, whatever protocol it came by: decoded, dispatched, awaited, encoded, counted.

Owns the order of these steps, and that a request's memory is given back however it ends. Knows no codes, no routes and no kserve.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

from contracts.artifact import Signature
from contracts.errors import DeadlineExceeded, InvalidValue, NotFound, SluiceError, Unavailable
from contracts.functions import MAX_NS
from contracts.units import MS, S, ms
from predictor.dispatch import Dispatcher, Outcome, Served, Ticket
from predictor.tensors import Array, Given, bind
from predictor.text import find as find_text

T = TypeVar("T")
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Encode = Callable[[Mapping[str, Array], Outcome], T]

VERSION = "1"
_WATCH_AFTER_S = 0.05
"""Who is not answered by then is watched: should the client hang up, its request is cancelled."""


class Decoded(NamedTuple, Generic[T]):
    """A request as its protocol decodes it: its inputs, and what makes an answer of the outputs: it reads them where they lie."""

    given: Sequence[Given]
    encode: Encode[T]


class ClientGone(Exception):
    """Nobody is there any more to hear the answer."""


class Finished(NamedTuple):
    """A request that has ended: `kind` is "ok" or the kind of error, `outcome` is there when it was answered. Times are monotonic.

    `headers` are pairs of name and value as the protocol has them, bytes or text.
    """

    model: str
    function: str
    kind: str
    outcome: Outcome | None
    start_ns: int
    end_ns: int
    headers: Iterable[tuple[Any, Any]]


class Front:
    """What all protocols share. `observers` hear of every request that has ended (traces, logs)."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self.dispatcher = dispatcher
        self.observers: list[Callable[[Finished], None]] = []

    async def infer(
        self,
        name: str,
        decode: Callable[[Signature], Decoded[T]],
        timeout_ns: int | None,
        receive: Receive | None = None,
        version: str = "",
        headers: Iterable[tuple[Any, Any]] = (),
    ) -> T:
        """The encoded answer of the model `name`; any SluiceError, or ClientGone where `receive` (ASGI) says so."""
        served = self.dispatcher.find(name)
        check_version(name, version)
        start_ns = time.monotonic_ns()
        try:
            signature = self.dispatcher.signature(served)
            given, encode = decode(signature)
            text = find_text(given, signature)
            if text is None:
                inputs = bind(given, signature)
            else:
                left_ns = min(timeout_ns or MAX_NS, served.info.function.timeout_ns)
                inputs = await self._tokens(name, signature, text, left_ns)
                timeout_ns = max(1, left_ns - (time.monotonic_ns() - start_ns))
            ticket = self.dispatcher.submit(served, signature, inputs, timeout_ns)
            try:
                with _watched(receive, ticket):
                    outcome = await ticket.future
                ran_ns = time.monotonic_ns()
                answer = encode(ticket.outputs, outcome)
            finally:
                self.dispatcher.finish(ticket)
        except (SluiceError, ClientGone, asyncio.CancelledError) as error:
            end_ns = time.monotonic_ns()
            kind = type(error).__name__ if isinstance(error, SluiceError) else "cancelled"
            served.metrics.failed(kind, end_ns - start_ns)
            self._tell(name, served, kind, None, start_ns, end_ns, headers)
            raise
        end_ns = time.monotonic_ns()
        served.metrics.succeeded(end_ns - start_ns, ticket.arrival_ns - start_ns, end_ns - ran_ns)
        self._tell(name, served, "ok", outcome, start_ns, end_ns, headers)
        return answer

    def _tell(
        self, name: str, served: Served, kind: str, outcome: Outcome | None, start_ns: int, end_ns: int, headers: Iterable[tuple[Any, Any]]
    ) -> None:
        if self.observers:
            finished = Finished(name, served.key, kind, outcome, start_ns, end_ns, headers)
            for observe in self.observers:
                observe(finished)

    async def _tokens(self, name: str, signature: Signature, text: Given, left_ns: int) -> dict[str, Array]:
        """The inputs that stand for a text; after the wait for them the function must still be what it was."""
        try:
            async with asyncio.timeout(left_ns / S):
                inputs = await self.dispatcher.tokenizers.inputs(text, signature, self.dispatcher.find(name).info.function.max_batch)
        except TimeoutError:
            raise DeadlineExceeded("the deadline passed before the text was tokenised") from None
        if self.dispatcher.signature(self.dispatcher.find(name)) is not signature:
            raise Unavailable(f"the model {name!r} has changed", retry_after_ms=1000)
        return inputs


@contextlib.contextmanager
def _watched(receive: Receive | None, ticket: Ticket) -> Iterator[None]:
    """Ends the wait with ClientGone when the client hangs up. Costs a task only for requests that wait long."""
    tasks: list[asyncio.Task[None]] = []

    async def watch(receive: Receive) -> None:
        if (await receive())["type"] == "http.disconnect" and not ticket.future.done():
            ticket.future.set_exception(ClientGone())

    if receive is None:
        yield
        return
    loop = asyncio.get_running_loop()
    timer = loop.call_later(_WATCH_AFTER_S, lambda: tasks.append(loop.create_task(watch(receive))))
    try:
        yield
    finally:
        timer.cancel()
        for task in tasks:
            task.cancel()


def check_version(name: str, version: str) -> None:
    """A model has one version, "1", which need not be named; NotFound for any other."""
    if version not in ("", VERSION):
        raise NotFound(f"there is no version {version!r} of the model {name!r}, only {VERSION!r}")


def parameters(outcome: Outcome) -> dict[str, Any]:
    """The timing of an answer, and where its rows lay in which batch, as V2 response parameters."""
    return {
        "sluice_queue_ms": ms(outcome.queue_ns),
        "sluice_swap_ms": ms(outcome.swap_ns),
        "sluice_run_ms": ms(outcome.run_ns),
        "sluice_batch": outcome.batch,
        "sluice_batch_row": outcome.row,
        "sluice_batch_rows": outcome.rows,
        "sluice_cold": outcome.cold,
        "sluice_device": outcome.device,
    }


def server_timing(outcome: Outcome) -> str:
    """The same for V1, as the Server-Timing header of the W3C has it."""
    return f"queue;dur={ms(outcome.queue_ns):.3f}, swap;dur={ms(outcome.swap_ns):.3f}, run;dur={ms(outcome.run_ns):.3f}"


def timeout_ns(value: bytes | str | None) -> int | None:
    """The `Sluice-Timeout-Ms` of a request in ns, None without one; InvalidValue if it is no number of milliseconds."""
    if value is None:
        return None
    text = value.decode("latin-1") if isinstance(value, bytes) else value
    try:
        timeout_ms = float(text)
    except ValueError:
        timeout_ms = 0.0
    if not 0 < timeout_ms < 1e9:
        raise InvalidValue("must be a number of milliseconds greater than 0", key="Sluice-Timeout-Ms", value=text)
    return max(1, int(timeout_ms * MS))
