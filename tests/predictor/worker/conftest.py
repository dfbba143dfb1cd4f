"""The agent's side of a lane, played over the real fork server, real lanes and real socketpairs."""

from __future__ import annotations

import functools
import itertools
import mmap
import os
import select
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from contracts.artifact import WeightIndex
from contracts.channel import Channel
from contracts.functions import FunctionClass, ModelFormat, ModelRef
from contracts.lane_page import LanePage
from contracts.lane_wire import (
    Attach,
    Attached,
    BatchDone,
    Copy,
    CopyGrant,
    CopyProgress,
    FromLaneCopy,
    FromLaneRun,
    LaneReady,
    MapSegment,
    Run,
    Spawn,
)
from contracts.units import MIB
from contracts.wire import Message, Part, TensorRef
from models.dtypes import TORCH_DTYPES
from models.load import load
from models.store_writer import write
from predictor.tensors import NUMPY

ROOT = Path(__file__).parents[3]
PATIENCE_S = 60.0
Arrays = Mapping[str, np.ndarray]


@dataclass
class Stored:
    """A model in the host store, and the answer it must give."""

    index: WeightIndex
    path: Path
    reference: Callable[[Arrays], dict[str, np.ndarray]]


@dataclass
class Batch:
    """A Run and where its outputs will lie."""

    run: Run
    segment: mmap.mmap

    def outputs(self, part: int = 0) -> dict[str, np.ndarray]:
        found = {}
        for ref in self.run.parts[part].outputs:
            raw = self.segment[ref.offset : ref.offset + ref.nbytes]
            found[ref.name] = np.frombuffer(raw, dtype=NUMPY[ref.dtype]).reshape(ref.shape)
        return found

    def gives(self, expected: dict[str, np.ndarray], part: int = 0) -> bool:
        """Whether a part's outputs are these, bit for bit."""
        found = self.outputs(part)
        return found.keys() == expected.keys() and all(found[name].tobytes() == expected[name].tobytes() for name in expected)


@dataclass
class LaneEnd:
    """The agent's end of one lane."""

    runs: Channel
    copies: Channel
    page: LanePage
    slab: mmap.mmap
    ready: LaneReady | None = None
    pid: int = 0
    pidfd: int = -1
    _batches: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    _copies: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def next_run(self) -> Message:
        received = self.runs.receive()
        assert received is not None, "the lane has gone"
        return received[0]

    def next_copy(self) -> Message:
        received = self.copies.receive()
        assert received is not None, "the lane has gone"
        return received[0]

    def send_attach(self, name: str, model: Stored) -> None:
        with model.path.open("rb") as weights:
            self.copies.send(Attach(name, msgspec.json.encode(model.index), str(model.path.parent)), [weights.fileno()])

    def attach(self, name: str, model: Stored) -> None:
        """Attaches a function and waits until it is ready."""
        self.send_attach(name, model)
        assert self.next_copy() == Attached(name)

    def begin_copy(self, name: str, offset: int, until: int) -> int:
        copy = next(self._copies)
        self.copies.send(Copy(copy, name, offset, until))
        return copy

    def until_copied(self, copy: int, nbytes: int) -> None:
        while True:
            message = self.next_copy()
            assert isinstance(message, CopyProgress)
            assert message.copy == copy
            if message.copied_bytes == nbytes:
                return

    def load(self, name: str, model: Stored, offset: int) -> None:
        """Attaches and copies all, in two grants."""
        self.attach(name, model)
        total = model.index.total_bytes
        copy = self.begin_copy(name, offset, total // 2)
        self.copies.send(CopyGrant(copy, total))
        self.until_copied(copy, total)

    def map(self, segment: int = 1, nbytes: int = 16 * MIB) -> mmap.mmap:
        fd = os.memfd_create("test-segment", os.MFD_CLOEXEC)
        os.ftruncate(fd, nbytes)
        self.runs.send(MapSegment(segment, nbytes), [fd])
        mapped = mmap.mmap(fd, nbytes)
        os.close(fd)
        return mapped

    def batch(self, name: str, model: Stored, parts: Sequence[Arrays], memory: mmap.mmap, offset: int = 0, **run: int | bool) -> Batch:
        """Places a batch's inputs and reserves its outputs, as a predictor does."""
        end = 0

        def place(tensor_name: str, dtype: str, shape: Sequence[int], nbytes: int) -> TensorRef:
            nonlocal end
            ref = TensorRef(tensor_name, dtype, tuple(shape), end, nbytes)
            end = -(-(end + nbytes) // 64) * 64
            return ref

        dtypes = {spec.name: spec.dtype for spec in model.index.signature.inputs}
        placed = []
        for arrays in parts:
            inputs = []
            for tensor_name, array in arrays.items():
                ref = place(tensor_name, dtypes[tensor_name], array.shape, array.nbytes)
                memory[ref.offset : ref.offset + ref.nbytes] = array.tobytes()
                inputs.append(ref)
            sizes = model.index.signature.bind({ref.name: (ref.dtype, ref.shape) for ref in inputs})
            outputs = [place(spec.name, spec.dtype, shape, nbytes) for spec, shape, nbytes in model.index.signature.output_shapes(sizes)]
            placed.append(Part(sizes.get("batch", 1), tuple(inputs), tuple(outputs)))
        fields = {"copy": 0, "preemptible": False, "segment": 1} | run
        return Batch(Run(batch=next(self._batches), function=name, offset=offset, parts=tuple(placed), **fields), memory)  # type: ignore[arg-type]

    def submit(self, batch: Batch) -> None:
        self.runs.send(batch.run)

    def answer(self, batch: Batch) -> BatchDone:
        self.submit(batch)
        done = self.next_run()
        assert isinstance(done, BatchDone)
        assert done.batch == batch.run.batch
        return done

    def gone(self) -> bool:
        """Waits until the process has ended."""
        return bool(select.select([self.pidfd], [], [], PATIENCE_S)[0])

    def close(self) -> None:
        self.runs.close()
        self.copies.close()
        if self.pidfd >= 0:
            os.close(self.pidfd)


class ForkServer:
    """The real fork server on a socketpair; `module` may put a fake below its devices."""

    def __init__(self, module: str = "predictor.worker") -> None:
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-m", module, "--socket", str(theirs.fileno())]
        self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()], cwd=ROOT)
        theirs.close()
        self.channel = Channel(ours, Message)
        self.ends: list[LaneEnd] = []

    def spawn(self, **changes: object) -> LaneEnd:
        """A lane that is ready."""
        spawn = Spawn(1, "cpu:0", 100, FunctionClass.LATENCY_SENSITIVE, 64 * MIB, threads=1, link_bytes_per_s=0, activation_bytes=0)
        spawn = msgspec.structs.replace(spawn, **changes)
        ends = [socket.socketpair() for _ in range(2)]
        slab_fd = os.memfd_create("test-slab", os.MFD_CLOEXEC)
        if spawn.slab_handle:
            os.ftruncate(slab_fd, spawn.slab_bytes)
        else:
            os.posix_fallocate(slab_fd, 0, spawn.slab_bytes)
        if spawn.device.startswith("cuda") and not spawn.slab_handle:
            spawn = msgspec.structs.replace(spawn, slab_handle=f"/proc/{os.getpid()}/fd/{slab_fd}".encode())
        page_fd = LanePage.create()
        self.channel.send(spawn, [ends[0][1].fileno(), ends[1][1].fileno(), slab_fd, page_fd])
        for ours, theirs in ends:
            ours.settimeout(PATIENCE_S)
            theirs.close()
        end = LaneEnd(Channel(ends[0][0], FromLaneRun), Channel(ends[1][0], FromLaneCopy), LanePage(page_fd), mmap.mmap(slab_fd, spawn.slab_bytes))
        os.close(page_fd)
        self.ends.append(end)
        ready = end.next_run()
        os.close(slab_fd)
        assert isinstance(ready, LaneReady)
        assert (ready.lane, ready.sm_percent) == (spawn.lane, spawn.sm_percent)
        end.ready = ready
        end.pid, end.pidfd = ready.pid, os.pidfd_open(ready.pid)
        return end

    def close_lanes(self) -> None:
        while self.ends:
            self.ends.pop().close()


def rows_of(model: Stored, rows: int, seed: int) -> dict[str, np.ndarray]:
    """Inputs for a model: numbers, tokens, and masks that leave some tokens out."""
    random = np.random.default_rng(seed)
    arrays: dict[str, np.ndarray] = {}
    for spec in model.index.signature.inputs:
        shape = [rows if dim == "batch" else 12 if isinstance(dim, str) else dim for dim in spec.shape]
        if spec.dtype == "FP32":
            arrays[spec.name] = random.standard_normal(shape, dtype=np.float32)
        else:
            arrays[spec.name] = random.integers(1, 2 if "mask" in spec.name else 1000, shape)
            if "mask" in spec.name:
                arrays[spec.name][:, 9:] = 0
    return arrays


@pytest.fixture(scope="session")
def keep(tmp_path_factory: pytest.TempPathFactory) -> Callable[[ModelRef], Stored]:
    """Puts a model into a host store. References run with one thread, as the lanes do."""
    torch.set_num_threads(1)
    store = tmp_path_factory.mktemp("store")

    @functools.cache
    def put(ref: ModelRef) -> Stored:
        loaded = load(ref)
        index = write(loaded, store, 1 << 40)

        def reference(arrays: Arrays) -> dict[str, np.ndarray]:
            tensors = {spec.name: torch.from_numpy(arrays[spec.name]).view(TORCH_DTYPES[spec.dtype]) for spec in index.signature.inputs}
            carriers = {spec.name: getattr(torch, NUMPY[spec.dtype].name) for spec in index.signature.outputs}
            return {name: tensor.view(carriers[name]).numpy() for name, tensor in loaded.run(tensors).items()}

        return Stored(index, store / f"{index.digest}.weights", reference)

    return put


@pytest.fixture(scope="session")
def stored(keep: Callable[[ModelRef], Stored]) -> Callable[[str], Stored]:
    """The model of the catalogue that a source names."""
    return lambda source: keep(ModelRef(ModelFormat.CATALOG, source))


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    server = ForkServer()
    yield server
    server.close_lanes()
    server.channel.close()
    assert server.process.wait(PATIENCE_S) == 0


@pytest.fixture
def spawn(server: ForkServer) -> Iterator[Callable[..., LaneEnd]]:
    """Makes lanes; they end with the test."""
    yield server.spawn
    server.close_lanes()


@pytest.fixture
def inputs() -> Callable[[Stored, int, int], dict[str, np.ndarray]]:
    return rows_of


@pytest.fixture
def lane(spawn: Callable[..., LaneEnd]) -> LaneEnd:
    return spawn()


@pytest.fixture
def server_of_its_own() -> Iterator[ForkServer]:
    """A fork server that a test may kill."""
    server = ForkServer()
    yield server
    server.close_lanes()
    server.channel.close()
    server.process.wait(PATIENCE_S)
