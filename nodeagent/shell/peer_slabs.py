"""The slabs of other devices, as they are offered to lanes that may copy weights from there.

Owns what was found about that: a lane says itself whether it can, and devices whose lanes die of trying are not offered again. Decides no copy.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping

from contracts.lane_wire import PeerMapped
from nodeagent.shell.lane import Lane
from nodeagent.shell.slabs import Slab

_log = logging.getLogger(__name__)
_DEATHS = 3


class PeerSlabs:
    """Of all devices."""

    def __init__(self, slabs: Mapping[str, Slab]) -> None:
        self._slabs = slabs
        self._lost: set[str] = set()
        self._deaths: Counter[tuple[str, str]] = Counter()
        self._said: set[tuple[str, str, str]] = set()

    def lane_up(self, lane: Lane) -> None:
        """It may map what its device is linked with."""
        for peer in self._slabs[lane.spec.device].peers:
            self._offer(lane, peer)

    def slab_up(self, device: str, lanes: Iterable[Lane]) -> None:
        """It is there again, for the lanes of others too."""
        self._lost.discard(device)
        for lane in lanes:
            if device in self._slabs[lane.spec.device].peers:
                self._offer(lane, device)

    def slab_lost(self, device: str, lanes: Iterable[Lane]) -> None:
        """No lane is to hold on to it."""
        self._lost.add(device)
        for lane in lanes:
            if device in self._slabs[lane.spec.device].peers:
                lane.unmap_peer(device)

    def mapped(self, lane: Lane, message: PeerMapped) -> bool:
        """Whether the lane can copy from there. Said once for each pair of devices and outcome."""
        self._deaths.pop((lane.spec.device, message.device), None)
        outcome = lane.spec.device, message.device, message.error
        if outcome not in self._said:
            self._said.add(outcome)
            if message.error:
                _log.warning("%s copies nothing from %s: %s", *outcome)
            else:
                _log.info("%s copies from %s, %.1f GB/s", lane.spec.device, message.device, message.bytes_per_s / 1e9)
        return not message.error

    def lane_closed(self, lane: Lane) -> None:
        """One that ends before it has answered may have died of it; some in a row have."""
        for peer in lane.mapping:
            pair = lane.spec.device, peer
            self._deaths[pair] += 1
            if self._deaths[pair] == _DEATHS:
                _log.warning("%s copies nothing from %s: %d lanes ended when they should have mapped its memory", *pair, _DEATHS)

    def _offer(self, lane: Lane, peer: str) -> None:
        if peer not in self._lost and self._deaths[lane.spec.device, peer] < _DEATHS:
            slab = self._slabs[peer]
            lane.map_peer(slab.lend(), slab.fd)
