"""A real GPU behind the real holder, fork server and lanes."""

from __future__ import annotations

import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from contracts.channel import Channel
from contracts.functions import ModelFormat, ModelRef
from contracts.lane_wire import Hold, SlabReady
from contracts.units import GIB
from models.load import load
from models.store_writer import write
from tests.predictor.worker.conftest import PATIENCE_S, ROOT, Arrays, ForkServer, LaneEnd, Stored, rows_of

SEAL = 7


@pytest.fixture(scope="session", autouse=True)
def gpu() -> None:
    if not any(Path("/dev").glob("nvidia[0-9]*")):
        pytest.skip("there is no GPU")
    # Asked in another process: lanes are forked from one that never asked.
    found = subprocess.run([sys.executable, "-c", "import torch; torch.zeros(1, device='cuda')"], capture_output=True, text=True, check=False)
    assert found.returncode == 0, f"there is a GPU, and torch cannot use it: {found.stderr}"


@pytest.fixture(scope="module")
def slab(gpu: None) -> Iterator[SlabReady]:
    ours, theirs = socket.socketpair()
    ours.settimeout(180)
    process = subprocess.Popen([sys.executable, "-m", "predictor.worker.devices.holder"], stdin=theirs, cwd=ROOT)
    theirs.close()
    channel = Channel(ours, SlabReady)
    channel.send(Hold("cuda:0", 2 * GIB, 0, seal=SEAL))
    received = channel.receive()
    assert received is not None
    assert isinstance(received[0], SlabReady)
    yield received[0]
    channel.close()
    assert process.wait(PATIENCE_S) == 0


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    server = ForkServer()
    yield server
    server.close_lanes()
    server.channel.close()
    assert server.process.wait(PATIENCE_S) == 0


@pytest.fixture
def start(server: ForkServer, slab: SlabReady) -> Iterator[Callable[..., LaneEnd]]:
    """A lane on the GPU; `changes` are of its Spawn."""
    told = {
        "device": "cuda:0",
        "backend": "quota",
        "slab_handle": slab.handle,
        "slab_bytes": slab.nbytes,
        "sms": slab.sms,
        "lane_sms": slab.sms,
        "piece_bytes": slab.piece_bytes,
        "whole_ns": slab.whole_ns,
        "activation_bytes": 2 * GIB,
    }
    yield lambda **changes: server.spawn(**told | changes)
    server.close_lanes()


@pytest.fixture(scope="session")
def stored() -> Iterator[Callable[[str], Stored]]:
    """A model of the catalogue; its reference runs unswapped on the same GPU. In shared memory, as a node's: a disk's file may not be pinned."""
    folder = tempfile.TemporaryDirectory(dir="/dev/shm")
    store = Path(folder.name)

    def put(source: str) -> Stored:
        loaded = load(ModelRef(ModelFormat.CATALOG, source))
        index = write(loaded, store, 64 * GIB)

        weights = {name: tensor.cuda() for name, tensor in loaded.executable.weights().items()}

        def reference(arrays: Arrays) -> dict[str, np.ndarray]:
            loaded.executable.bind(weights)
            with torch.inference_mode():
                outputs = loaded.executable({name: torch.from_numpy(array).cuda() for name, array in arrays.items()})
            return {name: tensor.cpu().numpy() for name, tensor in outputs.items()}

        return Stored(index, store / f"{index.digest}.weights", reference)

    yield put
    folder.cleanup()


@pytest.fixture
def inputs() -> Callable[[Stored, int, int], dict[str, np.ndarray]]:
    return rows_of
