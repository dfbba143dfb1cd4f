"""Predictors: who they are, which functions they own, and what they ask for.

Owns each predictor's connection, segment and unanswered ids. A predictor that breaks the protocol is closed; one that asks for what it may not have
gets Failed. Never schedules: an accepted Submit becomes a Request and goes to the agent.
"""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import socket
import time
from collections.abc import Iterator, Sequence
from typing import Protocol

from contracts.channel import AsyncChannel
from contracts.errors import NotFound, NotPermitted, ProtocolError, SluiceError, Unavailable, to_wire
from contracts.wire import PROTOCOL_VERSION, Cancel, Failed, FunctionChanged, FunctionGone, Hello, Message, Submit, ToAgent, Tokenizer, Welcome
from nodeagent.shell.functions import Entry, Functions
from nodeagent.shell.listener import credentials
from nodeagent.shell.requests import Request, count_rows
from nodeagent.shell.segments import Segment, check_segment

_log = logging.getLogger(__name__)
_RESERVED_FDS = 128
"""Descriptors that predictors cannot take, however many connect: lanes, loader and control connections need them."""


class PeersOwner(Protocol):
    """What predictors need of the agent."""

    def submit(self, request: Request, rows: int) -> None:
        """A request was accepted: it is answered once, by `Peer.answer` or `Peer.fail`."""

    def cancel(self, request: int) -> None:
        """Nobody waits for it any more."""

    def segment_free(self, segment: Segment) -> None:
        """Lanes may unmap it."""


class Peer:
    """One connection. `requests` maps the predictor's own ids to the agent's, until they are answered.

    `granted` None: nothing was granted yet; empty: every function. `tokenizers`: for each function that it was told of, the tokenizer that it was
    told of; as long as that does not change, it has it.
    """

    __slots__ = ("channel", "granted", "pid", "requests", "segment", "tokenizers")

    def __init__(self, pid: int, granted: frozenset[str] | None) -> None:
        self.pid = pid
        self.granted = granted
        self.requests: dict[int, int] = {}
        self.segment: Segment | None = None
        self.tokenizers: dict[str, str] = {}
        self.channel: AsyncChannel

    def owns(self, key: str) -> bool:
        """Whether the supervisor granted it this function."""
        return self.granted is not None and (not self.granted or key in self.granted)

    def welcome(self, entries: Sequence[Entry]) -> None:
        """Tells it of all the functions that it owns."""
        self._send_tokenizers(entries)
        self.channel.send(Welcome(tuple(entry.info for entry in entries)))

    def announce(self, entry: Entry) -> None:
        """Tells it of one function."""
        self._send_tokenizers([entry])
        self.channel.send(FunctionChanged(entry.info))

    def withdraw(self, key: str) -> None:
        """Tells it that a function is not its own any more."""
        self.tokenizers.pop(key, None)
        self.channel.send(FunctionGone(key))

    def _send_tokenizers(self, entries: Sequence[Entry]) -> None:
        """What they name and it does not have, each once."""
        missing: dict[str, int] = {}
        for entry in entries:
            name, fd = entry.tokenizer or ("", -1)
            if name and self.tokenizers.get(entry.function.key) != name:
                missing[name] = fd
            self.tokenizers[entry.function.key] = name
        for name, fd in missing.items():
            self.channel.send(Tokenizer(name), fds=[fd])

    def fail(self, submit_id: int, error: SluiceError) -> None:
        """Tells the predictor that a batch gets no answer."""
        self.channel.send(Failed(submit_id, *to_wire(error)))


class Peers:
    """All predictors, and what each process was granted."""

    def __init__(self, functions: Functions, owner: PeersOwner) -> None:
        self._functions = functions
        self._owner = owner
        self._loop = asyncio.get_running_loop()
        self._peers: set[Peer] = set()
        self._grants: dict[int, tuple[frozenset[str], int]] = {}
        self._segments = 0
        self._requests = 0
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._last_fd = limit - min(_RESERVED_FDS, limit // 2)
        self.draining = False

    def __iter__(self) -> Iterator[Peer]:
        return iter(list(self._peers))

    def connect(self, sock: socket.socket) -> None:
        """A process connected to `agent.sock`."""
        pid = credentials(sock).pid
        if sock.fileno() > self._last_fd:
            _log.warning("process %d is turned away: too many connections (raise the agent's limit of open files)", pid)
            sock.close()
            return
        grant = self._grants.get(pid)
        peer = Peer(pid, None if grant is None else grant[0])
        peer.channel = AsyncChannel(
            sock, ToAgent, lambda message, fds: self._on_message(peer, message, fds), lambda error: self._on_close(peer, error)
        )
        self._peers.add(peer)

    def grant(self, pid: int, functions: tuple[str, ...]) -> None:
        """The process may use these functions (none: all) until it ends; NotFound if it has ended already."""
        if pid not in self._grants:
            try:
                pidfd = os.pidfd_open(pid)
            except (OSError, ValueError) as error:
                raise NotFound(f"no process {pid} to grant functions to ({error})") from None
            self._loop.add_reader(pidfd, self._revoke, pid, pidfd)
        else:
            pidfd = self._grants[pid][1]
        granted = frozenset(functions)
        self._grants[pid] = (granted, pidfd)
        for peer in self._peers:
            if peer.pid == pid:
                self._regrant(peer, granted)

    def function_changed(self, entry: Entry) -> None:
        """Tells those who own it."""
        for peer in self._peers:
            if peer.segment is not None and peer.owns(entry.function.key):
                peer.announce(entry)

    def function_gone(self, key: str) -> None:
        """Tells those who owned it."""
        for peer in self._peers:
            if peer.segment is not None and peer.owns(key):
                peer.withdraw(key)

    def close(self) -> None:
        """Closes every connection."""
        for peer in self:
            peer.channel.close()
        for pid, (_, pidfd) in list(self._grants.items()):
            self._revoke(pid, pidfd)

    def _revoke(self, pid: int, pidfd: int) -> None:
        self._loop.remove_reader(pidfd)
        os.close(pidfd)
        del self._grants[pid]

    def _regrant(self, peer: Peer, granted: frozenset[str]) -> None:
        before = {entry.function.key for entry in self._functions if peer.owns(entry.function.key)}
        peer.granted = granted
        if peer.segment is None:
            return
        for entry in self._functions:
            if peer.owns(entry.function.key) and entry.function.key not in before:
                peer.announce(entry)
        for key in before:
            if not peer.owns(key):
                peer.withdraw(key)

    def _on_message(self, peer: Peer, message: Message, fds: list[int]) -> None:
        try:
            if isinstance(message, Submit):
                self._on_submit(peer, message)
            elif isinstance(message, Cancel):
                request = peer.requests.get(message.id)
                if request is not None:
                    self._owner.cancel(request)
            elif isinstance(message, Hello):
                self._on_hello(peer, message, fds[0])
        except ProtocolError as error:
            peer.channel.close(error)

    def _on_hello(self, peer: Peer, message: Hello, fd: int) -> None:
        try:
            if peer.segment is not None:
                raise ProtocolError("a second Hello on one connection")
            if message.protocol != PROTOCOL_VERSION:
                raise ProtocolError(f"the predictor speaks protocol {message.protocol}, this agent {PROTOCOL_VERSION}")
            if fd > self._last_fd:
                raise ProtocolError("too many predictors: the agent may open no more files")
            check_segment(fd, message.segment_bytes)
        except ProtocolError:
            os.close(fd)
            raise
        self._segments += 1
        peer.segment = Segment(self._segments, fd, message.segment_bytes, self._owner.segment_free)
        peer.welcome([entry for entry in self._functions if peer.owns(entry.function.key)])

    def _on_submit(self, peer: Peer, submit: Submit) -> None:
        segment = peer.segment
        if segment is None:
            raise ProtocolError("a Submit before the Hello")
        if submit.id in peer.requests:
            raise ProtocolError(f"submit id {submit.id} is not answered yet")
        try:
            entry = self._admit(peer, submit.function)
            rows = count_rows(submit, entry.stored.index.signature, entry.function.max_batch, segment.nbytes)
        except SluiceError as error:
            peer.fail(submit.id, error)
            return
        self._requests += 1
        request = Request(self._requests, submit, entry, peer, segment, time.monotonic_ns())
        peer.requests[submit.id] = request.id
        segment.refs += 1
        self._owner.submit(request, rows)

    def _admit(self, peer: Peer, key: str) -> Entry:
        if not peer.owns(key):
            raise NotPermitted(f"process {peer.pid} was not granted function {key[:80]!r}")
        entry = self._functions.get(key)
        if entry is None:
            raise NotFound(f"no function {key[:80]!r} on this node")
        if self.draining:
            raise Unavailable("the node agent is stopping", retry_after_ms=1000)
        if entry.state != "ready":
            raise Unavailable(f"{key} is {entry.state}" + (f": {entry.reason}" if entry.reason else ""), retry_after_ms=1000)
        return entry

    def _on_close(self, peer: Peer, error: Exception | None) -> None:
        if error is not None:
            _log.warning("predictor %d is closed: %s", peer.pid, error)
        self._peers.discard(peer)
        for request in list(peer.requests.values()):
            self._owner.cancel(request)
        if peer.segment is not None:
            peer.segment.close()
