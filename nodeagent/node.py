"""The node's records and the desk between its policies: what waits, what has become free, which commands go out. It decides nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from contracts.units import S
from nodeagent import events as ev
from nodeagent.copies import Link
from nodeagent.entities import Device, FunctionState, Lane
from nodeagent.ready import ReadyQueue
from nodeagent.settings import DeviceSpec, Settings
from nodeagent.tokens import NEVER_NS


class Node:
    """Shared by `NodeState`, `Dispatcher`, `LanePool` and `Swaps`; `functions` are by number, removed ones that still run included."""

    def __init__(self, specs: Sequence[DeviceSpec], settings: Settings) -> None:
        self.settings = settings
        self.links: dict[str, Link] = {}
        self.devices: dict[str, Device] = {}
        for spec in specs:
            link = self.links.setdefault(spec.link or spec.id, _link(spec.link_bytes_per_s, settings))
            self.devices[spec.id] = Device(spec, link)
        self.host_links = tuple(self.links.values())
        self.device_list = tuple(self.devices.values())
        self.lanes: dict[int, Lane] = {}
        self.functions: dict[int, FunctionState] = {}
        self.ready = ReadyQueue()
        self.freed: dict[Device, None] = {}
        self.restart_ns = NEVER_NS
        """When the first device that had to wait may start a lane again."""
        self.watch_ns = NEVER_NS
        """When lanes are next looked at: whether one hangs."""
        self._out: list[ev.Command] = []
        self.emit: Callable[[ev.Command], None] = self._out.append
        """A command goes out, after those before it."""
        self._last_number = 0

    def take_commands(self) -> list[ev.Command]:
        """All that has gone out since the last time."""
        commands = self._out.copy()
        self._out.clear()
        return commands

    def free(self, device: Device) -> None:
        """SMs, a lane or memory of this device have become free: the next dispatch looks there."""
        self.freed[device] = None

    def watch(self, at_ns: int) -> None:
        """Something began that would by then be suspected to hang."""
        if at_ns < self.watch_ns:
            self.watch_ns = at_ns

    def start_after(self, device: Device, at_ns: int) -> None:
        """No lane is started on this device before then; 0: it need not wait."""
        device.start_after_ns = at_ns
        self.restart_ns = min((other.start_after_ns for other in self.device_list if other.start_after_ns), default=NEVER_NS)

    def link_peer(self, source: Device, target: Device, bytes_per_s: int) -> None:
        """There is a way straight from one device's memory to another's."""
        if source.spec.id not in target.peer_links:
            link = target.peer_links[source.spec.id] = _link(bytes_per_s, self.settings)
            self.links[f"{source.spec.id} to {target.spec.id}"] = link

    def next_number(self) -> int:
        """A number for a lane, a copy or a declaration of a function."""
        self._last_number += 1
        return self._last_number


def _link(bytes_per_s: int, settings: Settings) -> Link:
    return Link(max(settings.chunk_bytes, bytes_per_s * settings.chunk_ns // S), settings.chunks_in_flight, bytes_per_s)
