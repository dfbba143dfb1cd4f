"""A node to measure on: an agent of its own, or one that runs already; and a predictor that has one batch in flight.

Owns the agent that it starts, its folders, and the functions that it declares, in a namespace of their own. It speaks the wire protocol and nothing
else; it schedules nothing and knows no statistics.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from contracts.artifact import Signature, WeightIndex
from contracts.channel import Channel, connect
from contracts.errors import SluiceError, Unavailable, from_wire
from contracts.functions import Function, Share
from contracts.status import FunctionStatus, NodeStatus
from contracts.units import GIB, S
from contracts.wire import (
    PROTOCOL_VERSION,
    Answer,
    Declare,
    Failed,
    GetStatus,
    Grant,
    Hello,
    Message,
    Part,
    Remove,
    Reply,
    SetShare,
    Submit,
    TensorRef,
    ToPredictor,
)
from models.store import find

NAMESPACE = "sluice-profile"
_TWIN = "twin"
_ALMOST_ALL = Share.of(100, 99)
_NEXT_TO_NOTHING = Share(1, 1)
_ALIGNMENT = 64
_START_S = 180.0
_STOP_S = 30.0
_POLL_S = 0.02
_TIMEOUT_NS = 600 * S
_MOST_ROWS = 1024
_PR_SET_PDEATHSIG = 1
# Looked up here: between fork and exec nothing may be imported or loaded.
_prctl = ctypes.CDLL(None).prctl

Arrays = Mapping[str, npt.NDArray[Any]]


AGENT_COMMAND = (sys.executable, "-m", "nodeagent")


class NodeOptions(msgspec.Struct, frozen=True):
    """How an agent is started for a sweep. Memory in bytes; `link_bytes_per_s` 0 means as fast as it goes; `sm_backend` as of the agent."""

    device: str = "cpu:0"
    device_bytes: int = GIB
    host_bytes: int = 4 * GIB
    threads: int = 1
    link_bytes_per_s: int = 0
    sm_backend: str = "auto"
    agent: tuple[str, ...] = AGENT_COMMAND


class Session:
    """A connection to an agent. `store` is the folder of its host weights, None where nobody knows it; `threads` the compute threads of its lanes."""

    def __init__(self, run_dir: Path, store: Path | None, threads: int = 1) -> None:
        """Connects; Unavailable when no agent listens there."""
        self.threads = threads
        self._run_dir = run_dir
        self._store = store
        self._ids = itertools.count(1)
        try:
            self._control = Channel(connect(str(run_dir / "control.sock")), Reply)
        except OSError as error:
            raise Unavailable(f"no node runs at {run_dir} ({error.strerror or error})") from None

    @contextlib.contextmanager
    def serving(self, function: Function, share: Share) -> Iterator[str]:
        """Declares a function under a key of the profiler's own, for any batch size, and removes it at the end; gives the key."""
        own = _own(function, share)
        self._ask(Declare, own)
        try:
            self._ask(Grant, os.getpid(), ())
            yield own.key
        finally:
            with contextlib.suppress(SluiceError):
                self._ask(Remove, own.key)

    @contextlib.contextmanager
    def chilling(self, function: Function) -> Iterator[Callable[[], None]]:
        """For a function that is served: gives a call that makes it cold.

        Declared anew it has no weights on the device; those in host memory stay, for a twin of it, which is never called, holds them. Meanwhile it
        may use the whole device, but for what the twin is guaranteed.
        """
        own = _own(function, _ALMOST_ALL)

        def chill() -> None:
            self._ask(Remove, own.key)
            self._ask(Declare, own)

        self.set_share(own.key, own.share)
        with self.serving(msgspec.structs.replace(function, name=_TWIN), _NEXT_TO_NOTHING):
            yield chill

    def index(self, function: Function) -> WeightIndex:
        """What the node's loader made of a function that is served; Unavailable when that is not in the store, or nobody knows where the store is."""
        found = find(self._store, function.model) if self._store is not None else None
        if found is None:
            raise Unavailable(f"the model of {function.key} is not in the node's weight store {self._store}: name the store of this node")
        return found

    def set_share(self, key: str, share: Share) -> None:
        """A new share from the next batch on; Refused when the node has not that much to guarantee."""
        self._ask(SetShare, key, share)

    def status(self) -> NodeStatus:
        """The node's status."""
        found = self._ask(GetStatus).status
        if found is None:
            raise Unavailable("the node answered without a status")
        return found

    def function(self, key: str) -> FunctionStatus:
        """One function's line of it."""
        return next(line for line in self.status().functions if line.key == key)

    def caller(self, key: str, signature: Signature, inputs: Arrays) -> Caller:
        """A predictor of its own that sends this batch to the function, again and again."""
        return Caller(self._run_dir, key, signature, inputs)

    def close(self) -> None:
        """Ends the connection."""
        self._control.close()

    def _ask(self, kind: type[Message], *fields: object) -> Reply:
        try:
            self._control.send(kind(next(self._ids), *fields))
            received = self._control.receive()
        except OSError as error:
            raise Unavailable(f"the node agent does not answer ({error})") from None
        if received is None:
            raise Unavailable("the node agent ended")
        reply = received[0]
        assert isinstance(reply, Reply)  # the channel decodes nothing else
        if reply.error is not None:
            raise from_wire(*reply.error)
        return reply


class Caller:
    """One connection with one segment, which holds one batch: its inputs, and room for its outputs."""

    def __init__(self, run_dir: Path, key: str, signature: Signature, inputs: Arrays) -> None:
        """Joins the agent, where the function is ready; InvalidTensor when the inputs do not fit it."""
        self._key = key
        self._ids = itertools.count(1)
        sizes = signature.bind({name: (_dtype(signature, name), array.shape) for name, array in inputs.items()})
        self._fd = os.memfd_create("sluice-profile", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            segment_bytes = self._place(signature, inputs, sizes)
            self._channel = Channel(connect(str(run_dir / "agent.sock")), ToPredictor)
            self._channel.send(Hello(PROTOCOL_VERSION, segment_bytes), [self._fd])
        except OSError as error:
            raise Unavailable(f"the node agent at {run_dir} cannot be joined ({error})") from None
        finally:
            os.close(self._fd)  # The agent has its own.

    def call(self) -> tuple[Answer, int]:
        """Runs the batch once: the agent's answer, and the latency as the client sees it in ns. The agent's error is raised."""
        begun_ns = time.monotonic_ns()
        number = next(self._ids)
        try:
            self._channel.send(Submit(number, self._key, self._parts, begun_ns + _TIMEOUT_NS, begun_ns + _TIMEOUT_NS))
            while (received := self._channel.receive()) is not None:
                took_ns = time.monotonic_ns() - begun_ns
                message, fds = received
                if isinstance(message, Answer) and message.id == number:
                    return message, took_ns
                if isinstance(message, Failed) and message.id == number:
                    raise from_wire(message.kind, message.message, message.retry_after_ms)
                for fd in fds:  # of news that only a whole predictor needs
                    os.close(fd)
        except OSError as error:
            raise Unavailable(f"the node agent does not answer ({error})") from None
        raise Unavailable("the node agent ended, or broke off the connection")

    def close(self) -> None:
        """Ends the connection; the segment goes with it."""
        self._channel.close()

    def __enter__(self) -> Caller:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _place(self, signature: Signature, inputs: Arrays, sizes: Mapping[str, int]) -> int:
        """Writes the inputs, lays out the outputs behind them, and says how long the segment is."""
        placed, outputs, at = [], [], 0
        for spec in signature.inputs:
            array = np.ascontiguousarray(inputs[spec.name])
            os.pwrite(self._fd, array.data, at)
            placed.append(TensorRef(spec.name, spec.dtype, array.shape, at, array.nbytes))
            at += _aligned(array.nbytes)
        for spec, shape, nbytes in signature.output_shapes(sizes):
            outputs.append(TensorRef(spec.name, spec.dtype, shape, at, nbytes))
            at += _aligned(nbytes)
        os.ftruncate(self._fd, at)
        self._parts = (Part(sizes.get("batch", 1), tuple(placed), tuple(outputs)),)
        return at


@contextlib.contextmanager
def saturating(caller: Caller) -> Iterator[None]:
    """Keeps a caller busy on a thread of its own: at each answer the next batch is sent."""
    stop = threading.Event()
    errors: list[SluiceError] = []

    def loop() -> None:
        try:
            while not stop.is_set():
                caller.call()
        except SluiceError as error:
            errors.append(error)

    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    if errors:
        raise errors[0]


@contextlib.contextmanager
def started(options: NodeOptions) -> Iterator[Session]:
    """A node agent for this sweep alone. However this process ends, the agent ends with it and takes the weights out of shared memory."""
    with (
        tempfile.TemporaryDirectory(prefix="sluice-profile-") as folder,
        tempfile.TemporaryDirectory(prefix="sluice-profile-", dir="/dev/shm") as store,
    ):
        run_dir = Path(folder, "run")
        log = Path(folder, "log")
        arguments = ["--run-dir", str(run_dir), "--store", store, "--device", options.device]
        arguments += ["--device-memory", str(options.device_bytes), "--host-memory", str(options.host_bytes), "--threads", str(options.threads)]
        arguments += ["--link-bandwidth", str(options.link_bytes_per_s), "--sm-backend", options.sm_backend, "--remove-store"]
        with log.open("wb") as output:
            agent = _spawn([*options.agent, *arguments], output.fileno())
        try:
            session = _reach(run_dir, Path(store), options.threads, agent, log)
            try:
                yield session
            finally:
                session.close()
        finally:
            agent.terminate()
            try:
                agent.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                agent.kill()
                agent.wait()


def _spawn(command: list[str], output: int) -> subprocess.Popen[bytes]:
    parent = os.getpid()

    def die_with_parent() -> None:
        _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(1)

    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True, preexec_fn=die_with_parent)


def _reach(run_dir: Path, store: Path, threads: int, agent: subprocess.Popen[bytes], log: Path) -> Session:
    deadline = time.monotonic() + _START_S
    while True:
        with contextlib.suppress(Unavailable):
            return Session(run_dir, store, threads)
        if agent.poll() is not None or time.monotonic() > deadline:
            state = "did not start in time" if agent.returncode is None else f"ended with code {agent.returncode}"
            last = log.read_text(errors="replace").strip().splitlines()[-1:] or ["it said nothing"]
            raise Unavailable(f"the node agent {state}: {last[0]}")
        time.sleep(_POLL_S)


def _own(function: Function, share: Share) -> Function:
    """The function as the profiler declares it: for batches of any size, its deadlines far away."""
    return msgspec.structs.replace(function, namespace=NAMESPACE, share=share, max_batch=_MOST_ROWS, timeout_ns=_TIMEOUT_NS)


def _dtype(signature: Signature, name: str) -> str:
    return next((spec.dtype for spec in signature.inputs if spec.name == name), "")


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
