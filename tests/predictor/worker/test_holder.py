"""The slab holder, a process of its own: takes what it is asked for, says what it measured, and ends with its channel or its context."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from contracts.channel import Channel
from contracts.errors import Unavailable
from contracts.lane_wire import Hold, SlabReady
from contracts.units import MIB
from predictor.worker.devices import seal
from predictor.worker.devices.holder import link_speed, take
from tests.predictor.worker.conftest import PATIENCE_S, ROOT
from tests.predictor.worker.fake_cuda import SMS, FakeCuda

Start = Callable[..., tuple[subprocess.Popen[bytes], Channel]]


@pytest.fixture
def start() -> Iterator[Start]:
    started: list[tuple[subprocess.Popen[bytes], Channel]] = []

    def begin(hold: Hold, **environment: str) -> tuple[subprocess.Popen[bytes], Channel]:
        ours, theirs = socket.socketpair()
        ours.settimeout(PATIENCE_S)
        command = [sys.executable, "-m", "tests.predictor.worker.fake_cuda_holder"]
        process = subprocess.Popen(command, stdin=theirs, cwd=ROOT, env=environment, stderr=subprocess.PIPE)
        theirs.close()
        started.append((process, Channel(ours, SlabReady)))
        started[-1][1].send(hold)
        return started[-1]

    yield begin
    for process, channel in started:
        channel.close()
        process.kill()
        process.communicate()


def slab_of(channel: Channel) -> SlabReady:
    received = channel.receive()
    assert received is not None
    assert isinstance(received[0], SlabReady)
    return received[0]


def test_a_slab_is_held_measured_and_lent_until_the_channel_ends(start: Start) -> None:
    process, channel = start(Hold("cuda:0", 4 * MIB, 0))
    slab = slab_of(channel)
    assert (slab.device, slab.name, slab.sms, slab.nbytes) == ("cuda:0", FakeCuda.name, SMS, 4 * MIB)
    assert slab.h2d_bytes_per_s > 0
    assert slab.piece_bytes in (MIB, 2 * MIB, 4 * MIB)
    assert slab.whole_ns > 0
    views = [FakeCuda(inline=True).open(slab.handle, slab.nbytes) for _ in range(2)]
    views[0][12345] = 7
    assert views[1][12345] == 7
    assert process.poll() is None
    channel.close()
    assert process.wait(PATIENCE_S) == 0


def test_behind_a_slab_that_others_read_lies_the_seal_that_was_asked_for(start: Start) -> None:
    _, channel = start(Hold("cuda:0", 4 * MIB, 0, seal=5))
    slab = slab_of(channel)
    assert slab.nbytes == 4 * MIB
    driver = FakeCuda()
    memory = driver.open_peer(slab.handle, slab.nbytes + seal.BYTES)
    assert seal.read(driver, memory[slab.nbytes :], 5) > 0
    with pytest.raises(Unavailable, match="cannot be trusted"):
        seal.read(driver, memory[slab.nbytes :], 6)
    driver.close()


@pytest.mark.parametrize("hold", [Hold("cuda:0", 2 << 30, 0), Hold("cuda:0", 0, 2 << 30)], ids=["more than is free", "a reserve above what is free"])
def test_what_does_not_fit_is_said(hold: Hold) -> None:
    driver = FakeCuda()
    with pytest.raises(Unavailable, match=r"cuda:0 has 1\.0 GiB free"):
        take(driver, hold)
    driver.close()


def test_without_a_size_it_takes_what_is_free_but_the_reserve() -> None:
    driver = FakeCuda()
    assert take(driver, Hold("cuda:0", 0, (1 << 30) - 6 * MIB - 1000)).numel() == 6 * MIB
    driver.close()


def test_a_broken_context_ends_it(start: Start, tmp_path: Path) -> None:
    process, channel = start(Hold("cuda:0", MIB, 0), FAKE_CUDA_BREAKS=str(tmp_path / "broken"))
    slab_of(channel)
    (tmp_path / "broken").touch()
    assert channel.receive() is None
    _, said = process.communicate(timeout=PATIENCE_S)
    assert b"the context on cuda:0 is broken" in said
    assert process.returncode == 1


def test_an_agent_that_goes_before_it_asked_leaves_nothing(start: Start) -> None:
    ours, theirs = socket.socketpair()
    process = subprocess.Popen([sys.executable, "-m", "tests.predictor.worker.fake_cuda_holder"], stdin=theirs, cwd=ROOT)
    theirs.close()
    ours.close()
    assert process.wait(PATIENCE_S) == 0


def test_a_slab_smaller_than_any_piece_is_measured_all_the_same() -> None:
    driver = FakeCuda()
    bytes_per_s, piece = link_speed(driver, torch.empty(100_000, dtype=torch.uint8))
    assert piece == 100_000
    assert bytes_per_s == pytest.approx(1e8, rel=0.01)
    driver.close()
