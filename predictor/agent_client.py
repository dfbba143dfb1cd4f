"""The predictor's end of `agent.sock`: one connection, made again whenever it is lost, and every batch that waits for its outcome.

Owns the connection, the segment and what is placed in it, and the promise that each submitted batch gets exactly one outcome. Never batches, decides
nothing about admission and knows no HTTP.

A lost agent takes its lanes with it, but a lane may still be writing as it ends. So each connection has a segment of its own: what is alive moves to
the new one, and the old memory is never used again.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from contracts.artifact import TensorSpec
from contracts.channel import AsyncChannel
from contracts.errors import DeadlineExceeded, NotFound, ProtocolError, SluiceError, Unavailable, from_wire
from contracts.units import MS, S
from contracts.wire import (
    PROTOCOL_VERSION,
    Answer,
    Cancel,
    Failed,
    FunctionChanged,
    FunctionGone,
    FunctionInfo,
    Hello,
    Message,
    Part,
    Submit,
    Tokenizer,
    ToPredictor,
    Welcome,
)
from predictor.segment import Array, Placement, Segment, place

_FIRST_RETRY_NS = 20 * MS
_LAST_RETRY_NS = 1 * S
log = logging.getLogger("sluice.predictor")


class Batch:
    """Requests that run together.

    `placements` are its parts in order; `done` hears its one outcome; one that is not
    `wanted` (nobody waits for it) is never sent.
    """

    __slots__ = ("deadline_ns", "done", "function", "id", "placements", "rows", "sent", "slo_deadline_ns", "submitted_ns", "wanted")

    def __init__(
        self,
        function: str,
        placements: Sequence[Placement],
        rows: Sequence[int],
        slo_deadline_ns: int,
        deadline_ns: int,
        done: Callable[[Batch, Answer | SluiceError], None],
    ) -> None:
        self.id = 0
        self.function = function
        self.placements = placements
        self.rows = rows
        self.slo_deadline_ns = slo_deadline_ns
        self.deadline_ns = deadline_ns
        self.done = done
        self.submitted_ns = 0
        self.sent = False
        self.wanted = True

    def message(self) -> Submit:
        """The batch as the agent gets it."""
        parts = tuple(Part(rows, at.inputs, at.outputs) for rows, at in zip(self.rows, self.placements, strict=True))
        return Submit(self.id, self.function, parts, self.slo_deadline_ns, self.deadline_ns)


class Listener(Protocol):
    """What the client tells its owner."""

    def on_function(self, info: FunctionInfo) -> None:
        """A function appeared, changed, or is with the agent again."""

    def on_tokenizer(self, name: str, fd: int) -> None:
        """A tokenizer that a function to come will name; the descriptor is the listener's."""

    def on_gone(self, key: str) -> None:
        """A function is no longer ours."""

    def on_retry(self, function: str) -> None:
        """A batch was submitted again to a new agent."""


class AgentClient:
    """One predictor's connection to its node agent.

    `patience_ns`: how long requests wait for the functions of a lost agent before they fail. `forget_ns`: how long after its return a function that
    it does not announce still counts as one that may come.
    """

    def __init__(self, path: str, segment_bytes: int, listener: Listener, patience_ns: int = 10 * S, forget_ns: int = 60 * S) -> None:
        self._path = path
        self._listener = listener
        self._patience_ns = patience_ns
        self._forget_ns = forget_ns
        self._loop = asyncio.get_running_loop()
        self._channel: AsyncChannel | None = None
        self._welcomed = False
        self._closed = False
        self._retry_ns = _FIRST_RETRY_NS
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self.segment = Segment(segment_bytes)
        self._fresh = True
        self._placements: dict[int, Placement] = {}
        """Those that move to a new segment: of requests without an outcome. What has its outputs stays where they are."""
        self._batches: dict[int, Batch] = {}
        self._last_id = 0
        self.functions: dict[str, FunctionInfo] = {}
        self._announced: set[str] = set()
        self._recovering: set[str] = set()

    @property
    def connected(self) -> bool:
        """Whether an agent has welcomed us."""
        return self._welcomed

    def live(self, key: str) -> bool:
        """Whether a batch of this function would be sent at once."""
        return key in self._announced and self.functions[key].state == "ready"

    def awaited(self, key: str) -> bool:
        """Whether the function was served until the agent was lost and may soon be served again."""
        return key in self._recovering

    def start(self) -> None:
        """Begins to connect, and goes on for ever."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        sock.setblocking(False)
        try:
            sock.connect(self._path)
        except OSError as error:
            sock.close()
            log.debug("no agent at %s yet: %s", self._path, error)
            self._connect_later()
            return
        if not self._fresh:
            self._renew_segment()
        self._fresh = False
        self._channel = AsyncChannel(sock, ToPredictor, self._on_message, self._on_close)
        self._channel.send(Hello(PROTOCOL_VERSION, self.segment.nbytes), fds=[self.segment.fd])

    def close(self) -> None:
        """Ends the connection for good."""
        self._closed = True
        for timer in self._timers.values():
            timer.cancel()
        if self._channel is not None:
            self._channel.close()
        self.segment.close()

    def place(self, inputs: Sequence[tuple[TensorSpec, Array]], outputs: Sequence[tuple[TensorSpec, tuple[int, ...], int]]) -> Placement | None:
        """Puts a request's inputs into shared memory, with room for its outputs; None when there is no room now."""
        placement = place(self.segment, inputs, outputs)
        if placement is not None:
            self._placements[id(placement)] = placement
        return placement

    def release(self, placement: Placement) -> None:
        """The request is over; its views of the segment are not to be used any more. Once for each placement."""
        self._placements.pop(id(placement), None)
        placement.segment.free(placement.offset)

    def submit(self, batch: Batch) -> None:
        """Takes a batch on. `batch.done` is called exactly once, later, never from in here."""
        self._last_id += 1
        batch.id = self._last_id
        self._batches[batch.id] = batch
        self._placements.update((id(placement), placement) for placement in batch.placements)
        if self.live(batch.function):
            self._send(batch)

    def cancel(self, batch: Batch) -> None:
        """Nobody waits for the batch. Its outcome still comes once, after which its memory is free."""
        batch.wanted = False
        if batch.sent and self._channel is not None:
            self._channel.send(Cancel(batch.id))
        elif batch.id in self._batches:
            self._loop.call_soon(self._finish, batch.id, Unavailable("cancelled"))

    def _send(self, batch: Batch) -> None:
        assert self._channel is not None
        batch.sent = True
        batch.submitted_ns = time.monotonic_ns()
        try:
            self._channel.send(batch.message())
        except ProtocolError as error:
            batch.wanted = False
            self._loop.call_soon(self._finish, batch.id, error)

    def _finish(self, id_: int, outcome: Answer | SluiceError) -> None:
        batch = self._batches.pop(id_, None)
        if batch is None:
            return
        for placement in batch.placements:
            del self._placements[id(placement)]
        batch.done(batch, outcome)

    def _on_message(self, message: Message, fds: list[int]) -> None:
        match message:
            case Answer():
                self._finish(message.id, message)
            case Failed():
                self._finish(message.id, from_wire(message.kind, message.message, message.retry_after_ms))
            case Welcome():
                self._welcomed = True
                self._retry_ns = _FIRST_RETRY_NS
                for info in message.functions:
                    self._announce(info)
                self._later("forget", self._forget_ns, self._forget)
            case FunctionChanged():
                self._announce(message.info)
            case FunctionGone():
                self._gone(message.function)
            case Tokenizer():
                self._listener.on_tokenizer(message.name, fds[0])

    def _announce(self, info: FunctionInfo) -> None:
        key = info.function.key
        self.functions[key] = info
        self._announced.add(key)
        if info.state != "loading":
            self._recovering.discard(key)
        if self.live(key):
            for batch in [batch for batch in self._batches.values() if batch.function == key and batch.wanted and not batch.sent]:
                self._send_again(batch)
        elif info.state == "failed":
            self._fail_unsent(key, Unavailable(f"{key} cannot be served: {info.reason}"))
        self._listener.on_function(info)

    def _send_again(self, batch: Batch) -> None:
        if time.monotonic_ns() >= batch.deadline_ns:
            self._finish(batch.id, DeadlineExceeded("the deadline passed while the node agent was away"))
            return
        if batch.submitted_ns:
            self._listener.on_retry(batch.function)
        self._send(batch)

    def _gone(self, key: str) -> None:
        if self.functions.pop(key, None) is None:
            return
        self._announced.discard(key)
        self._recovering.discard(key)
        self._fail_unsent(key, NotFound(f"the function {key} was removed"))
        self._listener.on_gone(key)

    def _fail_unsent(self, key: str, error: SluiceError) -> None:
        for batch in list(self._batches.values()):
            if not batch.sent and batch.function == key:
                self._finish(batch.id, error)

    def _on_close(self, error: Exception | None) -> None:
        self._channel = None
        self._welcomed = False
        self._recovering.update(key for key in self._announced if self.functions[key].state == "ready")
        self._announced.clear()
        for batch in list(self._batches.values()):
            batch.sent = False
            if not batch.wanted:
                self._finish(batch.id, Unavailable("cancelled"))
        if self._closed:
            return
        log.warning("lost the node agent (%s); connecting again", error or "it closed the connection")
        self._cancel("forget")
        self._later("patience", self._patience_ns, self._lose_patience)
        for info in list(self.functions.values()):
            self._listener.on_function(info)
        self._connect_later()

    def _connect_later(self) -> None:
        self._later("connect", self._retry_ns, self.start)
        self._retry_ns = min(self._retry_ns * 2, _LAST_RETRY_NS)

    def _renew_segment(self) -> None:
        old, self.segment = self.segment, Segment(self.segment.nbytes)
        old.close()
        for placement in self._placements.values():
            if not placement.move(self.segment):
                raise AssertionError("what was alive in a segment fits a new one of the same size")

    def _lose_patience(self) -> None:
        waited_for = self._recovering | (self.functions.keys() - self._announced)
        self._recovering.clear()
        for key in waited_for:
            self._fail_unsent(key, Unavailable(f"{key} did not come back with the node agent", retry_after_ms=1000))
            self._listener.on_function(self.functions[key])

    def _forget(self) -> None:
        for key in self.functions.keys() - self._announced:
            self._gone(key)

    def _later(self, name: str, delay_ns: int, call: Callable[[], None]) -> None:
        self._cancel(name)
        self._timers[name] = self._loop.call_later(delay_ns / S, call)

    def _cancel(self, name: str) -> None:
        if (timer := self._timers.pop(name, None)) is not None:
            timer.cancel()
