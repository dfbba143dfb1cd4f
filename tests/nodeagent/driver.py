"""Drives a NodeState as the shell does, but lets the test decide what happens next. It checks what the state may not get wrong towards its driver."""

from __future__ import annotations

from contracts.functions import FunctionClass, Share, Slo
from contracts.units import MS, S
from nodeagent import events as ev
from nodeagent.settings import DeviceSpec, Settings
from nodeagent.state import NodeState
from tests.nodeagent.slabs import Slabs


class Driver:
    """Keeps what the lanes would know: which are up, what they run, which copies they make and how far they may go.

    The devices share `links` links of so many bytes a second. Lanes that come up find a way of `peer_bytes_per_s` from each other device's memory,
    none with 0.
    """

    def __init__(
        self,
        devices: int = 1,
        capacity: int = 100 << 20,
        settings: Settings | None = None,
        *,
        exclusive: bool = False,
        links: int = 9,
        link_bytes_per_s: int = 8 * S,
    ) -> None:
        specs = [DeviceSpec(f"cpu:{n}", capacity, link_bytes_per_s, f"link:{n % links}", exclusive) for n in range(devices)]
        self.state = NodeState(specs, settings)
        self.now_ns = S
        self.starting: dict[int, ev.StartLane] = {}
        self.up: dict[int, ev.StartLane] = {}
        self.running: dict[int, ev.Run] = {}
        self.paused: dict[int, ev.Run] = {}
        self.preempted: set[int] = set()
        self.copies: dict[int, tuple[int, int]] = {}
        self.copied: dict[int, int] = {}
        self.moved_ns: dict[int, int] = {}
        self.outcomes: dict[int, ev.Answer | ev.Reject] = {}
        self.slabs = Slabs()
        self.peer_bytes_per_s = 0
        self.accepted: set[int] = set()
        self.history: list[ev.Command] = []

    def send(self, event: ev.Event) -> list[ev.Command]:
        """Hands over an event at the present time, carries out the commands, checks the invariants."""
        commands = self.state.handle(event, self.now_ns)
        for command in commands:
            self._carry_out(command)
        self.history += commands
        self.state.check()
        self._check_progress()
        return commands

    def _check_progress(self) -> None:
        """Work that may run never waits while nothing at all is under way: no run, no copy, no lane that comes or goes."""
        copying = any(self.copied[copy] < until for copy, (_, until) in self.copies.items())
        held_up = any(device.start_after_ns or device.lost for device in self.state.devices.values())
        if not (self.running or self.starting or copying or held_up):
            waiting = [item.function if hasattr(item, "function") else item for item in self.state.node.ready.head(5)]
            assert not waiting, f"stalled: {[(item.spec.key, item.lane_key, list(item.extents)) for item in waiting]}"

    def _carry_out(self, command: ev.Command) -> None:
        match command:
            case ev.StartLane():
                self.starting[command.lane] = command
            case ev.StopLane():
                lane = self.state.lanes[command.lane]
                hung = lane.active and self.now_ns - lane.since_ns >= self.state.settings.hang_ns
                idle = lane.request is None and not self._copies_of(command.lane)
                lost = lane.device.lost or self._reads_lost(command.lane)
                assert idle or hung or self._stands_still(command.lane) or lost, "idle, or hung, or its device is lost, or one that it reads"
                self.up.pop(command.lane, None)
                self.running.pop(command.lane, None)
                self.paused.pop(command.lane, None)
                self.preempted.discard(command.lane)
                self.starting[command.lane] = ev.StartLane(command.lane, "", 1, FunctionClass.BEST_EFFORT)
            case ev.Run():
                assert command.lane in self.up and command.lane not in self.running and command.lane not in self.paused, "one batch at a time"
                assert not command.copy or self.copies[command.copy][0] == command.lane, "a lane waits only for a copy of its own"
                self.running[command.lane] = command
            case ev.Preempt():
                assert self.running[command.lane].preemptible
                self.preempted.add(command.lane)
            case ev.Resume():
                self.running[command.lane] = self.paused.pop(command.lane)
            case ev.Copy():
                self.copies[command.copy] = (command.lane, command.until_bytes)
                self.copied[command.copy] = 0
                self.slabs.begin(command, self.state.lanes[command.lane].device.spec.id, self.state.functions[command.function].spec.weight_bytes)
                self.moved_ns[command.copy] = self.now_ns
            case ev.CopyGrant():
                assert command.until_bytes > self.copies[command.copy][1], "a grant goes forward"
                if self.copies[command.copy][1] == self.copied[command.copy]:
                    self.moved_ns[command.copy] = self.now_ns
                self.copies[command.copy] = (command.lane, command.until_bytes)
            case ev.Answer() | ev.Reject():
                assert command.request in self.accepted and command.request not in self.outcomes, f"{command} answers twice"
                self.outcomes[command.request] = command
            case ev.Evict():
                pass
            case _:
                raise AssertionError(command)

    def _copies_of(self, lane: int) -> list[int]:
        """Its copies that are not complete."""
        return [task.copy for link in self.state.node.links.values() for task in link.tasks.values() if task.lane == lane]

    def _stands_still(self, lane: int) -> bool:
        """It has a copy to go on with, and no part of that has arrived for long."""
        return any(
            self.copied[copy] < self.copies[copy][1] and self.now_ns - self.moved_ns[copy] >= self.state.settings.hang_ns
            for copy in self._copies_of(lane)
        )

    def _reads_lost(self, lane: int) -> bool:
        return any(reader == lane and self.state.devices[read.device].lost for reader, read in self.slabs.reads.values())

    def declare(self, name: str, **options: object) -> ev.FunctionSpec:
        """A function with small defaults; `share` is (sm, quota percent[, limit percent])."""
        share = options.pop("share", (100, 10))
        assert isinstance(share, tuple)
        spec = ev.FunctionSpec(
            key=name,
            cls=FunctionClass(str(options.pop("cls", FunctionClass.LATENCY_SENSITIVE))),
            share=Share.of(*share),
            slo=Slo(latency_ns=100 * MS),
            weight_bytes=int(str(options.pop("weight_bytes", 10 << 20))),
            run_ns=int(str(options.pop("run_ns", 5 * MS))),
            max_queue=int(str(options.pop("max_queue", 256))),
        )
        assert not options
        self.send(ev.FunctionDeclared(spec))
        return spec

    def arrive(self, request: int, function: str, slo_ns: int = 100 * MS, timeout_ns: int = 60 * S, rows: int = 1) -> list[ev.Command]:
        """A request; it counts as accepted."""
        self.accepted.add(request)
        return self.send(ev.RequestArrived(request, function, rows, rows, self.now_ns + slo_ns, self.now_ns + timeout_ns))

    def lanes_up(self) -> None:
        """All lanes that were asked for come up; those that were told to stop are gone."""
        while self.starting:
            lane, command = self.starting.popitem()
            if command.device:
                self.up[lane] = command
                self.send(ev.LaneUp(lane))
                self.find_peers(lane)
            else:
                self.lose(lane)

    def find_peers(self, lane: int) -> None:
        """A lane proves that it reads what the other devices have."""
        for device in self.state.devices.values() if self.peer_bytes_per_s else ():
            if lane in self.up and device.spec.id != self.up[lane].device and not device.lost:
                self.send(ev.PeerUp(lane, device.spec.id, self.peer_bytes_per_s))

    def copy_on(self, copy: int, nbytes: int | None = None) -> None:
        """A copy moves as far as it may."""
        lane, until = self.copies[copy]
        assert lane in self.up
        self.copied[copy] = min(until, self.copied[copy] + nbytes) if nbytes else until
        self.moved_ns[copy] = self.now_ns
        extents = (extent for device in self.state.devices.values() for extent in device.memory.extents.values())
        if any(extent.copy == copy and extent.nbytes == self.copied[copy] for extent in extents):
            self.slabs.complete(copy)
        self.send(ev.CopyProgress(copy, self.copied[copy]))

    def copy_all(self) -> None:
        """All copies come to their end."""
        while pending := [copy for copy, (lane, until) in self.copies.items() if lane in self.up and self.copied[copy] < until]:
            for copy in pending:
                self.copy_on(copy)

    def finish(self, lane: int, gpu_ns: int = 5 * MS, *, ok: bool = True) -> list[ev.Command]:
        """A lane's batch ends."""
        run = self.running.pop(lane)
        self.preempted.discard(lane)
        return self.send(ev.BatchFinished(lane, run.request, gpu_ns, 0, ok))

    def pause(self, lane: int, gpu_ns: int = MS) -> list[ev.Command]:
        """A preempted batch reaches its next gate."""
        run = self.paused[lane] = self.running.pop(lane)
        self.preempted.discard(lane)
        return self.send(ev.BatchPaused(lane, run.request, gpu_ns))

    def lose(self, lane: int) -> list[ev.Command]:
        """A lane dies."""
        for where in (self.up, self.starting, self.running, self.paused):
            where.pop(lane, None)
        self.preempted.discard(lane)
        for copy in [copy for copy, (owner, _) in self.copies.items() if owner == lane]:
            del self.copies[copy], self.copied[copy]
            self.slabs.abandon(copy)
        return self.send(ev.LaneLost(lane))

    def lose_device(self, device: str) -> list[ev.Command]:
        """A device's memory goes."""
        self.slabs.forget(device)
        return self.send(ev.DeviceLost(device))

    def bring_back(self, device: str) -> None:
        """A lost device is up again, once its old lanes have gone."""
        found = self.state.devices[device]
        if found.lost:
            for lane in list(found.lanes):
                self.lose(lane)
            self.slabs.renew(device)
            self.send(ev.DeviceUp(device))
            for lane in list(self.up):
                self.find_peers(lane)

    def drain(self, step_ns: int = 5 * MS, steps: int = 20_000) -> None:
        """Lets everything that was accepted come to its end."""
        for _ in range(steps):
            if self.accepted == set(self.outcomes):
                return
            for device in self.state.devices:
                self.bring_back(device)
            self.lanes_up()
            self.copy_all()
            for lane in list(self.preempted):
                self.pause(lane)
            for lane in list(self.running):
                self.finish(lane)
            tick = self.state.next_tick_ns()
            self.now_ns = max(self.now_ns + step_ns, min(tick or 0, self.now_ns + S))
            self.send(ev.Tick())
        raise AssertionError(f"never answered: {sorted(self.accepted - set(self.outcomes))[:10]}")


def warm(driver: Driver, *names: str) -> None:
    """Each function runs once, so that its lane is up and its weights are resident."""
    for at, name in enumerate(names, 1):
        driver.lanes_up()
        driver.arrive(-at, name)
        driver.drain()


def of(commands: list[ev.Command], kind: type[ev.Command]) -> list[ev.Command]:
    """The commands of one kind."""
    return [command for command in commands if isinstance(command, kind)]


def runs(commands: list[ev.Command]) -> list[str]:
    """The functions that are told to run."""
    return [command.function for command in commands if isinstance(command, ev.Run)]
