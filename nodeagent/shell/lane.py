"""One lane process as the agent sees it: its two channels, its page, what it has mapped, and the batch that it runs.

Owns the protocol with the lane. A lane that answers what it was not asked is closed; `Lanes` sees to its end. Decides nothing.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections import deque
from collections.abc import Callable
from typing import Protocol

from contracts.channel import AsyncChannel
from contracts.errors import ProtocolError
from contracts.lane_page import LanePage
from contracts.lane_wire import (
    Attached,
    BatchDone,
    BatchPaused,
    Copy,
    CopyGrant,
    CopyProgress,
    Detach,
    FromLaneCopy,
    FromLaneRun,
    LaneReady,
    MapPeer,
    MapSegment,
    PeerMapped,
    Resume,
    Run,
    UnmapPeer,
    UnmapSegment,
)
from contracts.wire import Message
from nodeagent import events
from nodeagent.shell.functions import Entry
from nodeagent.shell.outbox import Outbox
from nodeagent.shell.requests import Request
from nodeagent.shell.segments import Segment


class LaneOwner(Protocol):
    """Who hears what a lane does."""

    def batch_paused(self, lane: Lane, request: Request, message: BatchPaused) -> None:
        """Its batch stands at a gate."""

    def batch_done(self, lane: Lane, request: Request, message: BatchDone) -> None:
        """Its batch has ended; the lane is free again."""

    def copy_progress(self, message: CopyProgress) -> None:
        """More of a copy has arrived."""

    def attach_failed(self, entry: Entry, error: str) -> None:
        """It cannot make the function's module."""

    def unpinned(self, lane: Lane, entry: Entry) -> None:
        """It copies the function's weights slowly."""

    def peer_up(self, lane: Lane, device: str, bytes_per_s: int) -> None:
        """It can copy weights from another device's memory."""


class LaneKeeper(Protocol):
    """Who sees to a lane's beginning and end."""

    def lane_proved(self, lane: Lane) -> None:
        """It has proved its SM cap."""

    def peer_mapped(self, lane: Lane, message: PeerMapped) -> None:
        """It has tried to map another device's slab."""

    def lane_closed(self, lane: Lane, error: Exception | None) -> None:
        """A channel has ended, or the lane broke the protocol."""


class Lane:
    """`state` is "starting", "idle" or "ending"; `_copies` holds what is under way: copy id -> (function, bytes arrived).

    `_attached` are the functions that the lane was told of, `_attaching` those of them for which it has not answered yet.
    """

    __slots__ = (
        "_ahead",
        "_attached",
        "_attaching",
        "_copies",
        "_copy",
        "_keeper",
        "_mapping",
        "_outbox",
        "_owner",
        "_page",
        "_prove_cap",
        "_retired",
        "_run",
        "_segments",
        "_unpinned",
        "pid",
        "pidfd",
        "running",
        "spec",
        "state",
    )

    def __init__(
        self,
        spec: events.StartLane,
        page: LanePage,
        outbox: Outbox,
        owner: LaneOwner,
        keeper: LaneKeeper,
        prove_cap: Callable[[events.StartLane, LaneReady], None],
    ) -> None:
        """`prove_cap` raises ProtocolError when the lane has not proved its SM cap."""
        self.spec = spec
        self.state = "starting"
        self.pid = 0
        """0 before it is known."""
        self.pidfd = -1
        self.running: Request | None = None
        self._page = page
        self._outbox = outbox
        self._owner = owner
        self._keeper = keeper
        self._prove_cap = prove_cap
        self._attached: dict[str, Entry] = {}
        self._attaching: dict[str, Entry] = {}
        self._unpinned: set[str] = set()
        self._ahead: deque[Entry] = deque()
        self._retired: set[str] = set()
        self._mapping: deque[str] = deque()
        self._segments: set[int] = set()
        self._copies: dict[int, tuple[Entry, int]] = {}
        self._run: AsyncChannel
        self._copy: AsyncChannel

    def connect(self, run: socket.socket, copy: socket.socket) -> None:
        """Takes over the agent's ends of the two channels."""
        self._run = AsyncChannel(run, FromLaneRun, self._on_run_message, self._on_close)
        self._copy = AsyncChannel(copy, FromLaneCopy, self._on_copy_message, self._on_close)

    def close(self, error: Exception | None = None) -> None:
        """Ends both channels, which the lane sees as its end; `lane_closed` follows once. No more messages come."""
        if self.state != "ending":
            self.state = "ending"
            self._run.close()
            self._copy.close()
            self._page.close()
            for entry in self._attaching.values():
                entry.attached.set()
            self._keeper.lane_closed(self, error)

    def kill(self) -> None:
        """SIGKILL, if its process is known."""
        if self.pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    @property
    def at_work(self) -> set[Entry]:
        """The functions that run or are copied here."""
        entries = {entry for entry, _ in self._copies.values()}
        if self.running is not None:
            entries.add(self.running.entry)
        return entries

    @property
    def attached(self) -> int:
        """How many functions it can copy and run at once."""
        return len(self._attached) - len(self._attaching)

    @property
    def unpinned(self) -> int:
        """How many of them it copies slowly."""
        return len(self._unpinned)

    def attach(self, entry: Entry) -> None:
        """Makes a function known to the lane now; `entry.attached` says when that is done."""
        self._attach(entry)
        self._outbox.flush()

    def attach_ahead(self, *entries: Entry) -> None:
        """Makes functions known to the lane that nothing needs yet, in this order, each when the lane has no other to attach.

        A busy lane takes one up between two batches: what Python does for it competes with a batch.
        """
        self._ahead.extend(entries)
        self._go_ahead()

    def begin(self, request: Request, command: events.Run) -> None:
        """Runs a request's batch; the function and the segment are made known to the lane first if they are not."""
        if self.state == "ending":
            self.running = request
            return
        entry, segment = request.entry, request.segment
        self._attach(entry)
        if segment.id not in self._segments:
            self._segments.add(segment.id)
            self._outbox.add(self._run, MapSegment(segment.id, segment.nbytes), segment.fd)
        self.running = request
        parts = request.submit.parts
        self._outbox.add(self._run, Run(request.id, entry.lane_name, command.offset, command.copy, segment.id, parts, command.preemptible))

    def preempt(self, request: int) -> None:
        """Asks the batch to pause at its next gate."""
        if self.state != "ending":
            self._page.pause_batch = request

    def resume(self, request: int) -> None:
        """A paused batch goes on."""
        if self.state != "ending":
            self._page.pause_batch = 0
            self._outbox.add(self._run, Resume(request))

    def begin_copy(self, entry: Entry, command: events.Copy) -> None:
        """Begins to copy a function's weights."""
        if self.state != "ending":
            self._attach(entry)
            self._copies[command.copy] = (entry, 0)
            copy = Copy(command.copy, entry.lane_name, command.offset, command.until_bytes, command.source, command.source_offset)
            self._outbox.add(self._copy, copy)

    @property
    def mapping(self) -> list[str]:
        """The devices whose slabs it was told to map and has not answered for."""
        return [device for device in self._mapping if device]

    def map_peer(self, slab: MapPeer, fd: int) -> None:
        """Offers another device's slab."""
        if self.state != "ending":
            self._mapping.append(slab.device)
            self._outbox.add(self._copy, slab, fd)

    def unmap_peer(self, device: str) -> None:
        """Takes it back; an answer that is still to come is of no more use."""
        if self.state != "ending":
            self._mapping = deque("" if mapping == device else mapping for mapping in self._mapping)
            self._outbox.add(self._copy, UnmapPeer(device))

    def grant(self, command: events.CopyGrant) -> None:
        """The copy may go on."""
        if self.state != "ending":
            self._outbox.add(self._copy, CopyGrant(command.copy, command.until_bytes))

    def unmap(self, segment: Segment) -> None:
        """No later batch refers to the segment."""
        if segment.id in self._segments and self.state != "ending":
            self._segments.remove(segment.id)
            self._outbox.add(self._run, UnmapSegment(segment.id))

    def retire(self, entry: Entry) -> None:
        """The function was removed: the lane forgets it as soon as nothing of it runs or is copied here."""
        if entry.lane_name in self._attached:
            self._retired.add(entry.lane_name)
            self._detach_retired()

    def _attach(self, entry: Entry) -> None:
        if entry.lane_name not in self._attached and self.state != "ending":
            self._attached[entry.lane_name] = self._attaching[entry.lane_name] = entry
            self._outbox.add(self._copy, entry.attach, entry.stored.fd)

    def _go_ahead(self) -> None:
        while self._ahead and not self._attaching:
            entry = self._ahead.popleft()
            if entry.state == "ready":
                self._attach(entry)
                self._outbox.flush()

    def _detach_retired(self) -> None:
        if not self._retired or self.state == "ending":
            return
        busy = {entry.lane_name for entry in self.at_work}
        for name in self._retired - busy:
            self._retired.remove(name)
            del self._attached[name]
            self._attaching.pop(name, None)
            self._unpinned.discard(name)
            self._outbox.add(self._copy, Detach(name))

    def _on_run_message(self, message: Message, fds: list[int]) -> None:
        try:
            if isinstance(message, BatchDone):
                request = self._running(message.batch)
                self.running = None
                self._page.pause_batch = 0
                self._detach_retired()
                self._owner.batch_done(self, request, message)
                self._go_ahead()
            elif isinstance(message, BatchPaused):
                self._owner.batch_paused(self, self._running(message.batch), message)
            elif isinstance(message, LaneReady):
                self._prove(message)
                self._keeper.lane_proved(self)
        except ProtocolError as error:
            self.close(error)

    def _prove(self, message: LaneReady) -> None:
        """Fail closed: a lane that cannot prove its cap does not serve."""
        if self.state != "starting" or message.lane != self.spec.lane:
            raise ProtocolError(f"lane {self.spec.lane} says that lane {message.lane} is ready")
        try:
            self.pidfd = os.pidfd_open(message.pid)
        except (OSError, ValueError) as error:
            raise ProtocolError(f"lane {self.spec.lane} says that it is process {message.pid}: {error}") from None
        self.pid = message.pid
        self._prove_cap(self.spec, message)
        self.state = "idle"

    def _running(self, batch: int) -> Request:
        if self.running is None or self.running.id != batch:
            raise ProtocolError(f"lane {self.spec.lane} speaks of batch {batch}, which it does not run")
        return self.running

    def _on_copy_message(self, message: Message, fds: list[int]) -> None:
        if isinstance(message, CopyProgress):
            self._on_progress(message)
        elif isinstance(message, Attached):
            self._on_attached(message)
        elif isinstance(message, PeerMapped):
            asked = self._mapping.popleft() if self._mapping else None
            if asked is None or asked not in ("", message.device):
                self.close(ProtocolError(f"lane {self.spec.lane} speaks of memory of {message.device}, which it was not told to map"))
            elif asked:
                self._keeper.peer_mapped(self, message)

    def _on_attached(self, message: Attached) -> None:
        entry = self._attaching.pop(message.function, None)
        if entry is not None:
            if message.error:
                self._owner.attach_failed(entry, message.error)
            elif not message.pinned:
                self._unpinned.add(message.function)
                self._owner.unpinned(self, entry)
            entry.attached.set()
        if self.running is None:
            self._go_ahead()

    def _on_progress(self, message: CopyProgress) -> None:
        known = self._copies.get(message.copy)
        if known is None:
            return
        entry, before = known
        total = entry.stored.index.total_bytes
        if not before <= message.copied_bytes <= total:
            self.close(ProtocolError(f"lane {self.spec.lane} says that {message.copied_bytes} of {total} bytes arrived, after {before}"))
            return
        if message.copied_bytes == total:
            del self._copies[message.copy]
            self._detach_retired()
        else:
            self._copies[message.copy] = (entry, message.copied_bytes)
        self._owner.copy_progress(message)

    def _on_close(self, error: Exception | None) -> None:
        self.close(error)
