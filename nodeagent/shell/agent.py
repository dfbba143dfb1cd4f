"""The asyncio shell of a node: feeds NodeState what happens, and carries out what it commands.

Owns the state, the payloads of accepted requests, and the timer. Decides nothing. An error of the state ends the process (its supervisor starts
another, which adopts the weights), because nothing that it said afterwards could be trusted.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Coroutine, Mapping

from contracts.errors import ExecutionError, Refused, SluiceError, Unavailable, from_wire, to_wire
from contracts.functions import Share
from contracts.lane_wire import BatchDone, BatchPaused, CopyProgress
from contracts.status import NodeStatus
from contracts.units import S
from contracts.wire import Answer, Failed
from nodeagent import events
from nodeagent.settings import Settings
from nodeagent.shell import metrics
from nodeagent.shell.ahead import Ahead
from nodeagent.shell.control import Controls
from nodeagent.shell.functions import Entry, Functions
from nodeagent.shell.hoststore import HostStore
from nodeagent.shell.lane import Lane
from nodeagent.shell.lanes import Lanes
from nodeagent.shell.listener import Listener
from nodeagent.shell.loader import Loader
from nodeagent.shell.options import Options
from nodeagent.shell.outbox import Outbox
from nodeagent.shell.peers import Peers
from nodeagent.shell.requests import KINDS, Request
from nodeagent.shell.segments import Segment
from nodeagent.shell.slabs import Slab
from nodeagent.shell.status import node_status
from nodeagent.state import NodeState

_log = logging.getLogger(__name__)
_TIMER_GRAIN_S = 0.0005


class Agent:
    """One node agent on the slabs of its devices, built inside a running loop by the holder of the run dir's lock."""

    def __init__(self, options: Options, slabs: Mapping[str, Slab]) -> None:
        self._options = options
        self._slabs = slabs
        self._loop = asyncio.get_running_loop()
        self._started_ns = time.monotonic_ns()
        self._state = NodeState([slab.spec for slab in slabs.values()], Settings(window_ns=options.window_ns, hang_ns=options.hang_ns))
        self._requests: dict[int, Request] = {}
        self._events: deque[events.Event] = deque()
        self._handling = False
        self._timer: asyncio.TimerHandle | None = None
        self._timer_ns = 0
        self._outbox = Outbox()
        self._stopping = asyncio.Event()
        self._answered_all = asyncio.Event()
        self._failure: Exception | None = None
        self._closed = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._carry_out: dict[type[events.Command], Callable[..., None]] = {
            events.Answer: self._answer,
            events.Run: self._run,
            events.Copy: self._copy,
            events.CopyGrant: self._grant_copy,
            events.Reject: self._reject,
            events.Evict: self._evict,
            events.Preempt: self._preempt,
            events.Resume: self._resume,
            events.StartLane: self._start_lane,
            events.StopLane: self._stop_lane,
        }
        self._store = HostStore(options.store, options.host_bytes)
        near = [slab.cpus for slab in slabs.values()]
        self._loader = Loader((*options.loader_command, "--store", str(options.store)), set().union(*near) if all(near) else ())
        self._functions = Functions(self._store, self._loader, self)
        self._peers = Peers(self._functions, self)
        self._lanes = Lanes(options, slabs, self._outbox, self)
        self._ahead = Ahead(self._state, self._functions, self._lanes, slabs)
        self._controls = Controls(self._functions, self._peers, self._status)

    async def run(self) -> None:
        """Serves until `stop`, then drains and cleans up. Raises what broke the state."""
        stop_metrics: Callable[[], None] | None = None
        listeners: list[Listener] = []
        try:
            if self._options.metrics_port is not None:
                port, stop_metrics = metrics.serve(
                    self._options.metrics_port, self._status, {name: slab.uuid for name, slab in self._slabs.items() if slab.uuid}
                )
                _log.info("metrics on http://127.0.0.1:%d/metrics", port)
            listeners.append(Listener(self._options.run_dir / "agent.sock", self._peers.connect))
            listeners.append(Listener(self._options.run_dir / "control.sock", self._controls.connect))
            self._keep(self._forget_unclaimed())
            await self._stopping.wait()
            await self._drain()
        finally:
            for listener in listeners:
                listener.close()
            await self._close()
            if stop_metrics is not None:
                await self._loop.run_in_executor(None, stop_metrics)
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """Takes no new requests, answers those that were accepted, and ends."""
        self._stopping.set()

    def handle(self, event: events.Event) -> None:
        """Feeds the state one event and carries out its commands; one that arises meanwhile waits for its turn."""
        if self._closed:
            return
        self._events.append(event)
        if self._handling:
            return
        self._handling = True
        try:
            while self._events:
                for command in self._state.handle(self._events.popleft(), time.monotonic_ns()):
                    self._carry_out[type(command)](command)
            self._outbox.flush()
            self._arm()
        except Exception as error:
            _log.exception("the node state failed; the agent ends")
            self._failure = error
            self._closed = True
            self.stop()
        finally:
            self._handling = False

    def refusal(self, key: str, share: Share, weight_bytes: int = 0) -> str | None:
        """Why a function with this share cannot be served (`FunctionsOwner`)."""
        for slab in self._slabs.values():
            reason = slab.refusal(share.sm_percent)
            if reason is not None:
                return reason
        return self._state.refusal(key, share, weight_bytes)

    # What functions and predictors tell.

    def function_changed(self, entry: Entry) -> None:
        """Owners learn of it, and those who watch (`FunctionsOwner`)."""
        self._peers.function_changed(entry)
        self._controls.function_changed(entry)
        if entry.state == "ready":
            self._ahead.function_changed(entry)

    def function_gone(self, entry: Entry) -> None:
        """Owners learn of it (`FunctionsOwner`)."""
        self._peers.function_gone(entry.function.key)

    async def prepare(self, entry: Entry) -> None:
        """Lanes that are there pin its weights (`FunctionsOwner`)."""
        await self._ahead.pinned(entry)

    def function_withdrawn(self, entry: Entry) -> None:
        """It gets no more requests (`FunctionsOwner`)."""
        self.handle(events.FunctionRemoved(entry.function.key))
        self.forget(entry)

    def forget(self, entry: Entry) -> None:
        """Lanes forget it when they can (`FunctionsOwner`)."""
        for lane in self._lanes:
            lane.retire(entry)
        self._outbox.flush()

    def submit(self, request: Request, rows: int) -> None:
        """A request was accepted (`PeersOwner`)."""
        submit = request.submit
        self._requests[request.id] = request
        requests = len(submit.parts)
        self.handle(events.RequestArrived(request.id, submit.function, rows, requests, submit.slo_deadline_ns, submit.deadline_ns))

    def cancel(self, request: int) -> None:
        """Nobody waits for it any more (`PeersOwner`)."""
        self.handle(events.RequestCancelled(request))

    def segment_free(self, segment: Segment) -> None:
        """Nobody refers to it any more (`PeersOwner`)."""
        for lane in self._lanes:
            lane.unmap(segment)
        if not self._handling:
            self._outbox.flush()

    # What lanes tell.

    def lane_up(self, lane: Lane) -> None:
        """It serves (`LanesOwner`)."""
        self.handle(events.LaneUp(lane.spec.lane))
        self._ahead.lane_up(lane)

    def lane_lost(self, lane: Lane) -> None:
        """Its process has gone (`LanesOwner`)."""
        self.handle(events.LaneLost(lane.spec.lane))
        if lane.running is not None:
            lane.running.segment.release()
        if not self._closed:
            for entry in lane.at_work:
                self._keep(self._functions.repair(entry))

    def device_lost(self, device: str) -> None:
        """Its memory has gone (`LanesOwner`)."""
        self.handle(events.DeviceLost(device))

    def device_up(self, device: str) -> None:
        """It has memory again (`LanesOwner`)."""
        self.handle(events.DeviceUp(device))

    def size_failed(self, device: str, sm_percent: int, reason: str) -> None:
        """Functions of a size that no lane can be held to are refused rather than served without their limit (`LanesOwner`)."""
        for entry in self._functions:
            if entry.function.share.sm_percent == sm_percent:
                self._functions.break_off(entry, Refused(f"no lane of {device} could be held to {sm_percent} % of its SMs: {reason}"))

    def batch_done(self, lane: Lane, request: Request, message: BatchDone) -> None:
        """A batch has ended, well or not (`LaneOwner`)."""
        request.error = message.error
        self.handle(events.BatchFinished(lane.spec.lane, request.id, message.gpu_ns, message.swap_ns, message.error is None))
        request.segment.release()

    def batch_paused(self, lane: Lane, request: Request, message: BatchPaused) -> None:
        """A batch stands at a gate (`LaneOwner`)."""
        self.handle(events.BatchPaused(lane.spec.lane, request.id, message.gpu_ns))

    def copy_progress(self, message: CopyProgress) -> None:
        """Weights have arrived (`LaneOwner`)."""
        self.handle(events.CopyProgress(message.copy, message.copied_bytes))

    def peer_up(self, lane: Lane, device: str, bytes_per_s: int) -> None:
        """A lane can copy from another device's memory (`LaneOwner`)."""
        self.handle(events.PeerUp(lane.spec.lane, device, bytes_per_s))

    def attach_failed(self, entry: Entry, error: str) -> None:
        """A lane cannot make its module, so no lane can (`LaneOwner`)."""
        self._functions.break_off(entry, ExecutionError(error))

    def unpinned(self, lane: Lane, entry: Entry) -> None:
        """Swaps of this function are slow (`LaneOwner`)."""
        self._ahead.unpinned(lane, entry)

    # What the state commands.

    def _run(self, command: events.Run) -> None:
        request = self._requests[command.request]
        request.segment.refs += 1
        self._lanes[command.lane].begin(request, command)

    def _copy(self, command: events.Copy) -> None:
        self._lanes[command.lane].begin_copy(self._functions[command.function], command)

    def _grant_copy(self, command: events.CopyGrant) -> None:
        self._lanes[command.lane].grant(command)

    def _evict(self, command: events.Evict) -> None:
        """Eviction only forgets: there is nothing to do."""

    def _preempt(self, command: events.Preempt) -> None:
        self._lanes[command.lane].preempt(command.request)

    def _resume(self, command: events.Resume) -> None:
        self._lanes[command.lane].resume(command.request)

    def _start_lane(self, command: events.StartLane) -> None:
        self._lanes.start(command)

    def _stop_lane(self, command: events.StopLane) -> None:
        self._lanes.stop(command.lane)

    def _answer(self, command: events.Answer) -> None:
        request = self._requests.pop(command.request)
        if request.error is not None:
            self._fail(request, from_wire(*request.error))
            return
        submit, peer, now_ns = request.submit, request.peer, time.monotonic_ns()
        request.entry.stats.answer(now_ns, now_ns - request.arrived_ns, len(submit.parts), now_ns <= submit.slo_deadline_ns)
        del peer.requests[submit.id]
        message = Answer(submit.id, command.queue_ns, command.swap_ns, command.run_ns, command.cold, command.device)
        self._outbox.add(peer.channel, message)
        self._forget(request)

    def _reject(self, command: events.Reject) -> None:
        request = self._requests.pop(command.request)
        error = KINDS[command.reason](f"{request.submit.function}: {command.reason}", retry_after_ms=command.retry_after_ms)
        self._fail(request, error)

    def _fail(self, request: Request, error: SluiceError) -> None:
        request.entry.stats.fail(error, len(request.submit.parts))
        del request.peer.requests[request.submit.id]
        self._outbox.add(request.peer.channel, Failed(request.submit.id, *to_wire(error)))
        self._forget(request)

    def _forget(self, request: Request) -> None:
        request.segment.release()
        if not self._requests:
            self._answered_all.set()

    # Time and the end.

    def _arm(self) -> None:
        """The timer fires no later than the state needs; one that fires too early only looks again."""
        due_ns = self._state.next_tick_ns()
        if due_ns is None or (self._timer is not None and self._timer_ns <= due_ns):
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer_ns = due_ns
        delay_s = max(0, due_ns - time.monotonic_ns()) / S
        self._timer = self._loop.call_later(delay_s + _TIMER_GRAIN_S, self._tick)

    def _tick(self) -> None:
        self._timer = None
        due_ns = self._state.next_tick_ns()
        if due_ns is not None and due_ns <= time.monotonic_ns():
            self.handle(events.Tick())
        else:
            self._arm()

    async def _drain(self) -> None:
        self._peers.draining = True
        self._answered_all.clear()
        if self._requests and not self._closed:
            try:
                await asyncio.wait_for(self._answered_all.wait(), self._options.drain_ns / S)
            except TimeoutError:
                _log.warning("%d requests were not answered within the drain time", len(self._requests))
        self._closed = True
        for request in self._requests.values():
            request.peer.fail(request.submit.id, Unavailable("the node agent is stopping", retry_after_ms=1000))

    async def _close(self) -> None:
        """Ends lanes, fork server and loader, and closes every connection."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        for task in self._tasks:
            task.cancel()
        self._controls.close()
        self._peers.close()
        await self._loader.close()
        await self._lanes.close()
        self._store.close(remove=self._options.remove_store)

    def _keep(self, work: Coroutine[None, None, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _forget_unclaimed(self) -> None:
        """After a restart the functions come back by and by; weights that none has claimed by then go."""
        await asyncio.sleep(self._options.adopt_ns / S)
        self._store.drop_unclaimed()

    def _status(self) -> NodeStatus:
        uptime_ns = time.monotonic_ns() - self._started_ns
        return node_status(self._state, self._functions, self._lanes, self._slabs, self._store, uptime_ns)
