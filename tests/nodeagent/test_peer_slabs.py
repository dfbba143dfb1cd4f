"""What lanes are offered of other devices' memory, and what the agent makes of their answers."""

from __future__ import annotations

import asyncio
import os
import socket
from typing import Any

import pytest

from contracts.channel import Channel
from contracts.errors import ProtocolError
from contracts.functions import FunctionClass
from contracts.lane_page import LanePage
from contracts.lane_wire import MapPeer, PeerMapped, ToLaneCopy, UnmapPeer
from nodeagent.events import StartLane
from nodeagent.shell.lane import Lane
from nodeagent.shell.outbox import Outbox
from nodeagent.shell.peer_slabs import PeerSlabs

PATIENCE_S = 60.0


class Slab:
    """A device's memory whose lanes may read that of `peers`."""

    def __init__(self, device: str, *peers: str) -> None:
        self.device, self.peers = device, peers
        self.fd = os.open(os.devnull, os.O_RDONLY)

    def lend(self) -> MapPeer:
        return MapPeer(self.device, 1 << 20, 1)


class End:
    """A lane of gpu:0 of which the test plays the process."""

    def __init__(self) -> None:
        self.closed: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()
        self.mapped: asyncio.Queue[PeerMapped] = asyncio.Queue()
        self.outbox = Outbox()
        page_fd = LanePage.create()
        owner: Any = self
        self.lane = Lane(StartLane(1, "gpu:0", 100, FunctionClass.LATENCY_SENSITIVE), LanePage(page_fd), self.outbox, owner, owner, lambda *_: None)
        os.close(page_fd)
        run, self._run = socket.socketpair()
        copy, theirs = socket.socketpair()
        theirs.settimeout(PATIENCE_S)
        self.copies = Channel(theirs, ToLaneCopy)
        self.lane.connect(run, copy)

    def lane_closed(self, lane: Lane, error: Exception | None) -> None:
        self.closed.set_result(error)

    def peer_mapped(self, lane: Lane, message: PeerMapped) -> None:
        self.mapped.put_nowait(message)

    def told(self) -> object:
        self.outbox.flush()
        received = self.copies.receive()
        assert received is not None
        for fd in received[1]:
            os.close(fd)
        return received[0]

    def close(self) -> None:
        self.lane.close()
        self.copies.close()
        self._run.close()


def slabs() -> dict[str, Any]:
    return {"gpu:0": Slab("gpu:0", "gpu:1"), "gpu:1": Slab("gpu:1", "gpu:0"), "gpu:2": Slab("gpu:2")}


def test_a_lane_is_offered_what_its_device_is_linked_with_and_has_it_taken_back_when_it_is_lost() -> None:
    async def play() -> None:
        end, peers = End(), PeerSlabs(slabs())
        peers.lane_up(end.lane)
        told = end.told()
        assert isinstance(told, MapPeer) and told.device == "gpu:1"
        peers.slab_lost("gpu:1", [end.lane])
        peers.slab_lost("gpu:2", [end.lane])
        assert end.told() == UnmapPeer("gpu:1")
        peers.slab_up("gpu:2", [end.lane])
        peers.slab_up("gpu:1", [end.lane])
        assert isinstance(end.told(), MapPeer)
        end.copies.send(PeerMapped("gpu:1", 5))
        end.copies.send(PeerMapped("gpu:1", 7))
        async with asyncio.timeout(PATIENCE_S):
            assert (await end.mapped.get()).bytes_per_s == 7, "the first answer is of memory that was lost meanwhile"
        assert end.lane.mapping == []
        end.close()

    asyncio.run(play())


@pytest.mark.parametrize("asked", [False, True], ids=["nothing", "another device's"])
def test_a_lane_that_speaks_of_memory_that_it_was_not_told_to_map_is_closed(asked: bool) -> None:
    async def play() -> None:
        end = End()
        if asked:
            PeerSlabs(slabs()).lane_up(end.lane)
        end.copies.send(PeerMapped("gpu:2", 5))
        async with asyncio.timeout(PATIENCE_S):
            assert isinstance(await end.closed, ProtocolError)
        assert end.mapped.empty()
        end.close()

    asyncio.run(play())


@pytest.mark.parametrize("answers", [False, True], ids=["they never answer", "one answers in between"])
def test_memory_that_lanes_die_of_is_offered_to_three_in_a_row(answers: bool) -> None:
    async def play() -> None:
        peers = PeerSlabs(slabs())
        for number in range(3):
            end = End()
            peers.lane_up(end.lane)
            assert end.lane.mapping == ["gpu:1"]
            if answers and number == 1:
                peers.mapped(end.lane, PeerMapped("gpu:1", 5))
            peers.lane_closed(end.lane)
            end.close()
        last = End()
        peers.lane_up(last.lane)
        assert last.lane.mapping == (["gpu:1"] if answers else [])
        last.close()

    asyncio.run(play())


def test_a_lane_that_cannot_read_it_copies_from_the_host() -> None:
    async def play() -> None:
        end, peers = End(), PeerSlabs(slabs())
        assert not peers.mapped(end.lane, PeerMapped("gpu:1", 0, "it reads other bytes"))
        assert peers.mapped(end.lane, PeerMapped("gpu:1", 5))
        end.close()

    asyncio.run(play())
