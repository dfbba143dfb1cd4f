"""Weights that come from another device's slab: the same answers as from the host, and no use of a slab that was not proven."""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from contracts.lane_wire import Copy, CopyGrant, MapPeer, PeerMapped, UnmapPeer
from contracts.units import MIB
from predictor.worker.devices import seal
from tests.predictor.worker.conftest import PATIENCE_S, ForkServer, LaneEnd
from tests.predictor.worker.fake_cuda import SMS, WHOLE_NS, FakeCuda
from tests.predictor.worker.rig import Rig, answer, reader

if TYPE_CHECKING:
    from tests.predictor.worker.conftest import Stored

    Store = Callable[[str], Stored]
    Inputs = Callable[[Stored, int, int], dict[str, np.ndarray]]

WORKERS = {"cpu": "predictor.worker", "cuda": "tests.predictor.worker.fake_cuda_worker"}
CHANGES: dict[str, dict[str, object]] = {
    "cpu": {},
    "cuda": {"device": "cuda:0", "backend": "mps", "sms": SMS, "lane_sms": SMS, "piece_bytes": MIB, "whole_ns": WHOLE_NS},
}
SLAB_BYTES = 32 * MIB
NUMBER = 77
AT = 4096


class Peer:
    """Another device's slab, with a model's weights in it and a seal behind it."""

    def __init__(self, kind: str, name: str, weights: Path) -> None:
        self.kind = kind
        self.name = f"{kind}:{name}"
        self.fd = os.memfd_create("peer-slab")
        os.posix_fallocate(self.fd, 0, SLAB_BYTES + seal.BYTES)
        content = weights.read_bytes()
        os.pwrite(self.fd, content, AT)
        if kind == "cuda":
            driver = FakeCuda(inline=True)
            seal.write(driver, driver.open(self.handle, SLAB_BYTES + seal.BYTES)[SLAB_BYTES:], NUMBER)
            driver.close()

    @property
    def handle(self) -> bytes:
        return f"/proc/{os.getpid()}/fd/{self.fd}".encode() if self.kind == "cuda" else b""

    def mapped(self, lane: LaneEnd, number: int = NUMBER) -> PeerMapped:
        lane.copies.send(MapPeer(self.name, SLAB_BYTES, 0, self.handle, number), [self.fd])
        found = lane.next_copy()
        assert isinstance(found, PeerMapped)
        assert found.device == self.name
        return found


@pytest.fixture(scope="module", params=WORKERS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def own_server(kind: str) -> Iterator[ForkServer]:
    server = ForkServer(WORKERS[kind])
    yield server
    server.close_lanes()
    server.channel.close()
    assert server.process.wait(PATIENCE_S) == 0


@pytest.fixture
def peered(own_server: ForkServer, kind: str) -> Iterator[LaneEnd]:
    yield own_server.spawn(**CHANGES[kind])
    own_server.close_lanes()


@pytest.fixture
def peer(kind: str, stored: Store) -> Iterator[Peer]:
    peer = Peer(kind, "1", stored("mlp?seed=1").path)
    yield peer
    os.close(peer.fd)


def test_a_function_runs_with_the_weights_of_a_peer_while_they_come(peered: LaneEnd, peer: Peer, stored: Store, inputs: Inputs) -> None:
    there, host = stored("mlp?seed=1"), stored("mlp?seed=2")
    total = host.index.total_bytes
    memory = peered.map()
    peered.attach("f", host)
    assert peer.mapped(peered).error == ""
    for turn, (source, model) in enumerate([(peer.name, there), ("", host)] * 2, 1):
        peered.slab[:total] = os.urandom(total)
        arrays = inputs(host, 2, turn)
        peered.copies.send(Copy(turn, "f", 0, total // 3, source, AT))
        batch = peered.batch("f", host, [arrays], memory, 0, copy=turn)
        peered.submit(batch)
        peered.until_copied(turn, total // 3)
        peered.copies.send(CopyGrant(turn, total))
        assert peered.next_run().error is None  # type: ignore[attr-defined]
        assert batch.gives(model.reference(arrays)), f"weights of {source or 'the host'}"
        peered.until_copied(turn, total)


def test_a_slab_that_is_lost_and_back_is_another(peered: LaneEnd, peer: Peer, kind: str, stored: Store) -> None:
    other, model = stored("mlp?seed=3"), stored("mlp?seed=1")
    total = model.index.total_bytes
    peered.attach("f", model)
    peer.mapped(peered)
    peered.copies.send(Copy(1, "f", 0, total, peer.name, AT))
    peered.until_copied(1, total)
    peered.copies.send(UnmapPeer(peer.name))
    again = Peer(kind, "1", other.path)
    again.mapped(peered)
    peered.copies.send(Copy(2, "f", 0, total, again.name, AT))
    peered.until_copied(2, total)
    assert peered.slab[:total] == other.path.read_bytes()
    os.close(again.fd)


@pytest.mark.parametrize(
    ("source", "offset"), [("cpu:9", 0), ("", SLAB_BYTES), ("", -1), ("unmapped", 0)], ids=["unknown", "outside", "before", "unmapped"]
)
def test_a_lane_never_copies_what_it_has_not_mapped(peered: LaneEnd, peer: Peer, stored: Store, source: str, offset: int) -> None:
    peered.attach("f", stored("mlp?seed=1"))
    peer.mapped(peered)
    if source == "unmapped":
        peered.copies.send(UnmapPeer(peer.name))
    name = peer.name if source in ("", "unmapped") else source
    peered.copies.send(Copy(1, "f", 0, 1, name, offset))
    assert peered.copies.receive() is None
    assert peered.gone()


def test_a_slab_that_cannot_be_mapped_is_refused_and_the_lane_serves_on(
    peered: LaneEnd, peer: Peer, kind: str, stored: Store, inputs: Inputs
) -> None:
    model = stored("mlp?seed=1")
    if kind == "cuda":
        assert "cannot be trusted" in peer.mapped(peered, NUMBER + 1).error
    os.ftruncate(peer.fd, SLAB_BYTES // 2)
    assert peer.mapped(peered).error
    memory = peered.map()
    peered.load("f", model, 0)
    arrays = inputs(model, 1, 1)
    batch = peered.batch("f", model, [arrays], memory, 0)
    assert peered.answer(batch).error is None
    assert batch.gives(model.reference(arrays))


def test_a_slab_is_let_go_of_only_after_the_copies_that_read_it() -> None:
    driver, content = FakeCuda(), bytes(range(200))
    function = reader(driver, "f", [100, 100], content)
    rig = Rig(driver, [function])
    source = Peer.__new__(Peer)
    source.kind, source.fd = "cuda", os.memfd_create("peer-slab")
    os.posix_fallocate(source.fd, 0, 4096 + seal.BYTES)
    os.pwrite(source.fd, content, 0)
    seal.write(driver, driver.open(source.handle, 4096 + seal.BYTES)[4096:], NUMBER)
    try:
        rig.device.map_peer(MapPeer("cuda:1", 4096, 0, source.handle, NUMBER), -1)
        slab = rig.device.peer("cuda:1")
        with driver.halted():
            copied = rig.device.copy(slab[:200], 0, 200, 0, "cuda:1")
            letting_go = threading.Thread(target=rig.device.unmap_peer, args=("cuda:1",))
            letting_go.start()
            letting_go.join(0.2)
            assert letting_go.is_alive(), "the copy has not ended"
            assert rig.device.peer("cuda:1") is not None
        letting_go.join(PATIENCE_S)
        assert rig.device.peer("cuda:1") is None
        copied.wait()
        with mmap.mmap(rig.slab_fd, 4096) as own:
            assert own[:200] == content
        assert rig.run(function, 0, 5)[1] == answer(content, 5)
    finally:
        os.close(source.fd)
        rig.close()
