"""One node of the simulated world: its lanes, copies and links, driven by the node agent's own `NodeState`.

Owns what the hardware would do with each command, and how long that takes. Decides nothing: who runs where and when, what is evicted and who pays for
what is decided by the code that runs in production.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Protocol

import msgspec
from msgspec import Meta

from contracts.units import MS, S
from nodeagent import events as ev
from nodeagent.entities import Lane
from nodeagent.settings import DeviceSpec, Settings
from nodeagent.state import NodeState
from nodeagent.tokens import NEVER_NS
from simulator.engine import Engine
from simulator.timeline import Timeline

_TICK = ev.Tick()
_STOPPED = -1
"""It was asked to pause."""


class RunTimes(Protocol):
    """How long batches run."""

    def run_ns(self, function: str, rows: int, sm_percent: int) -> int:
        """GPU time of one warm batch alone on a lane of so many SMs."""


class Beside(Protocol):
    """How batches slow each other down."""

    def slowdown(self, function: str, sm_percent: int, others: Iterable[tuple[str, int]]) -> float:
        """How many times as long a batch takes beside batches of these functions on so many percent of the SMs."""


class Hardware(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a node's parts take beside running. `segment_ns`: a best-effort batch reaches its next gate within this time.

    `handover_ns`: a lane stands still so long for each batch, until it hears of it and until the node agent hears of its end; nobody pays for that.
    `tail`: the part of a run that follows the arrival of the last weights, since layers run while later ones are copied. `cold_slowdown`: how many
    times as long a batch computes while its weights are copied. `neighbour_slowdown`: how much longer it takes for each whole GPU's worth of SMs that
    others run on beside it.
    """

    lane_start_ns: Annotated[int, Meta(ge=0)] = 500 * MS
    copy_start_ns: Annotated[int, Meta(ge=0)] = MS // 20
    handover_ns: Annotated[int, Meta(ge=0)] = 0
    segment_ns: Annotated[int, Meta(ge=0)] = MS
    tail: Annotated[float, Meta(ge=0, le=1)] = 0.1
    cold_slowdown: Annotated[float, Meta(ge=1)] = 1.0
    neighbour_slowdown: Annotated[float, Meta(ge=0)] = 0.0


class Listener(Protocol):
    """Who waits for the outcomes of requests."""

    def answered(self, answer: ev.Answer) -> None:
        """A batch was run."""

    def rejected(self, reject: ev.Reject) -> None:
        """A batch was given up."""


class _Batch:
    """On a lane. It has `left_ns` to run since `since_ns`; `ends_ns` is when it will have, 0 while weights are missing, or _STOPPED."""

    __slots__ = ("copy", "ends_ns", "left_ns", "request", "since_ns", "swap_ns", "tail_ns")

    def __init__(self, request: int, run_ns: int, tail_ns: int, copy: int, now_ns: int) -> None:
        self.request = request
        self.left_ns = run_ns
        self.tail_ns = tail_ns
        self.copy = copy
        self.since_ns = now_ns
        self.ends_ns = 0
        self.swap_ns = 0


class SimulatedNode:
    """Carries out the commands of one `NodeState` in virtual time. Set `listener` before the first request; `timeline` is told what happened."""

    def __init__(
        self,
        engine: Engine,
        devices: Sequence[DeviceSpec],
        times: RunTimes,
        hardware: Hardware,
        settings: Settings | None = None,
        timeline: Timeline | None = None,
        beside: Beside | None = None,
        *,
        peer_bytes_per_s: int = 0,
    ) -> None:
        """With `peer_bytes_per_s` every two devices have a link of that speed, each way, that lanes find when they come up."""
        self.state = NodeState(devices, settings)
        self._timeline = timeline
        self._engine = engine
        self._times = times
        self._hardware = hardware
        self._beside = beside
        self._bytes_per_s: dict[str | tuple[str, str], int] = {device.link or device.id: device.link_bytes_per_s for device in devices}
        self._link_of = {device.id: device.link or device.id for device in devices}
        self._peer_bytes_per_s = peer_bytes_per_s
        if peer_bytes_per_s:
            self._bytes_per_s |= {(source.id, target.id): peer_bytes_per_s for source in devices for target in devices if source is not target}
        self._link_free_ns = dict.fromkeys(self._bytes_per_s, 0)
        self._batches: dict[int, _Batch] = {}
        self._copies: dict[int, tuple[str | tuple[str, str], int]] = {}
        self._granted: dict[int, int] = {}
        self._tick_ns = NEVER_NS
        self._carry: dict[type[ev.Command], Callable[..., None]] = {
            ev.Run: self._run,
            ev.Copy: self._copy,
            ev.CopyGrant: self._copy_grant,
            ev.Preempt: self._preempt,
            ev.Resume: self._resume,
            ev.Evict: lambda command: None,
            ev.StartLane: self._start_lane,
            ev.StopLane: self._stop_lane,
        }

    def _report_to(self, listener: Listener) -> None:
        self._carry |= {ev.Answer: listener.answered, ev.Reject: listener.rejected}

    listener = property(fset=_report_to, doc="Who hears of outcomes from now on; it is only ever set.")

    def handle(self, event: ev.Event) -> None:
        """Something happens to the node now."""
        carry = self._carry
        for command in self.state.handle(event, self._engine.now_ns):
            carry[type(command)](command)
        if self.state.tick_ns < self._tick_ns:
            self._set_alarm()

    def _set_alarm(self) -> None:
        self._tick_ns = self.state.tick_ns
        self._engine.at(self._tick_ns, self._tick, self._tick_ns)

    def _tick(self, tick_ns: int) -> None:
        """What it was set for may have passed meanwhile: then it is set anew."""
        if tick_ns != self._tick_ns:
            return
        self._tick_ns = NEVER_NS
        if self.state.tick_ns <= tick_ns:
            self.handle(_TICK)
        elif self.state.tick_ns < NEVER_NS:
            self._set_alarm()

    # Lanes.

    def _start_lane(self, command: ev.StartLane) -> None:
        self._engine.at(self._engine.now_ns + self._hardware.lane_start_ns, self._lane_up, command)

    def _lane_up(self, command: ev.StartLane) -> None:
        self.handle(ev.LaneUp(command.lane))
        if self._peer_bytes_per_s:
            for device in self._link_of:
                if device != command.device:
                    self.handle(ev.PeerUp(command.lane, device, self._peer_bytes_per_s))

    def _stop_lane(self, command: ev.StopLane) -> None:
        self._engine.at(self._engine.now_ns, self.handle, ev.LaneLost(command.lane))

    # Batches.

    def _run(self, command: ev.Run) -> None:
        lane, now_ns = self.state.lanes[command.lane], self._engine.now_ns
        assert lane.request is not None
        run_ns = self._times.run_ns(command.function, lane.request.rows, lane.sm_percent)
        copy = command.copy if command.copy in self._copies else 0
        slower = self._hardware.cold_slowdown if copy else 1.0
        if lane.device.running_sm > lane.sm_percent:
            slower *= self._slowdown(lane, command.function)
        if slower != 1.0:
            run_ns = max(1, int(run_ns * slower))
        tail_ns = int(run_ns * self._hardware.tail) if copy else 0
        begin_ns = now_ns + self._hardware.handover_ns
        batch = self._batches[command.lane] = _Batch(command.request, run_ns, tail_ns, copy, begin_ns)
        if not copy:
            self._end_at(command.lane, batch, begin_ns + run_ns)

    def _slowdown(self, lane: Lane, function: str) -> float:
        """Beside those that run now; who comes or goes later changes nothing any more."""
        if self._beside is None:
            return 1 + self._hardware.neighbour_slowdown * (lane.device.running_sm - lane.sm_percent) / 100
        others = (self.state.lanes[number] for number in self._batches if number != lane.number)
        running = [
            (other.request.function.spec.key, other.sm_percent) for other in others if other.device is lane.device and other.request is not None
        ]
        return self._beside.slowdown(function, lane.sm_percent, running)

    def _end_at(self, lane: int, batch: _Batch, ends_ns: int) -> None:
        batch.ends_ns = ends_ns
        self._engine.at(ends_ns, self._finish, lane, batch, ends_ns)

    def _finish(self, lane: int, batch: _Batch, ends_ns: int) -> None:
        if batch.ends_ns == ends_ns and self._batches.get(lane) is batch:
            del self._batches[lane]
            if self._timeline is not None:
                self._draw(self._timeline, lane, batch)
            self.handle(ev.BatchFinished(lane, batch.request, batch.left_ns, batch.swap_ns))

    def _preempt(self, command: ev.Preempt) -> None:
        """It stands still at its next gate, unless it ends before. One that waits for weights is at a gate already."""
        batch, now_ns = self._batches[command.lane], self._engine.now_ns
        gate_ns = now_ns + (self._hardware.segment_ns if batch.ends_ns else 0)
        if not batch.ends_ns or gate_ns < batch.ends_ns:
            left_ns = min(batch.left_ns, batch.ends_ns - gate_ns) if batch.ends_ns else batch.left_ns
            batch.ends_ns = _STOPPED
            self._engine.at(gate_ns, self._pause, command.lane, batch, left_ns)

    def _pause(self, lane: int, batch: _Batch, left_ns: int) -> None:
        ran_ns, batch.left_ns = batch.left_ns - left_ns, left_ns
        if self._timeline is not None:
            self._draw(self._timeline, lane, batch)
        self.handle(ev.BatchPaused(lane, batch.request, ran_ns))

    def _resume(self, command: ev.Resume) -> None:
        batch, now_ns = self._batches[command.lane], self._engine.now_ns
        batch.since_ns = now_ns
        batch.ends_ns = 0
        if not batch.copy:
            self._end_at(command.lane, batch, now_ns + batch.left_ns)

    def _draw(self, timeline: Timeline, lane: int, batch: _Batch) -> None:
        """A batch has run, or stood on its lane waiting for weights, until now."""
        found = self.state.lanes[lane]
        assert found.request is not None
        track = f"lane {lane} ({found.sm_percent} % {found.key[1]})"
        timeline.span(found.device.spec.id, track, found.request.function.spec.key, batch.since_ns, self._engine.now_ns)

    # Copies.

    def _copy(self, command: ev.Copy) -> None:
        lane = self.state.lanes[command.lane]
        total = self.state.functions[command.function].spec.weight_bytes
        device = lane.device.spec.id
        self._copies[command.copy] = ((command.source, device) if command.source else self._link_of[device], total)
        self._granted[command.copy] = 0
        self._move(command.copy, command.until_bytes, self._hardware.copy_start_ns)

    def _copy_grant(self, command: ev.CopyGrant) -> None:
        self._move(command.copy, command.until_bytes, 0)

    def _move(self, copy: int, until_bytes: int, start_ns: int) -> None:
        """The link takes chunks one after another."""
        nbytes = until_bytes - self._granted[copy]
        if nbytes <= 0:
            return
        link, _ = self._copies[copy]
        self._granted[copy] = until_bytes
        begin_ns = max(self._engine.now_ns + start_ns, self._link_free_ns[link])
        self._link_free_ns[link] = begin_ns + nbytes * S // self._bytes_per_s[link]
        self._engine.at(self._link_free_ns[link], self._moved, copy, until_bytes)
        if self._timeline is not None:
            self._timeline.span("links", link if isinstance(link, str) else " to ".join(link), f"copy {copy}", begin_ns, self._link_free_ns[link])

    def _moved(self, copy: int, copied_bytes: int) -> None:
        _, total = self._copies[copy]
        if copied_bytes == total:
            del self._copies[copy], self._granted[copy]
            self._weights_are_there(copy)
        self.handle(ev.CopyProgress(copy, copied_bytes))

    def _weights_are_there(self, copy: int) -> None:
        """Whoever ran behind this copy ends when it would have without waiting, or when what depends on the last weights has run."""
        now_ns = self._engine.now_ns
        for lane, batch in self._batches.items():
            if batch.copy == copy:
                batch.copy = 0
                if batch.ends_ns == 0:
                    ends_ns = max(batch.since_ns + batch.left_ns, now_ns + min(batch.tail_ns, batch.left_ns))
                    batch.swap_ns = ends_ns - batch.since_ns - batch.left_ns
                    self._end_at(lane, batch, ends_ns)
