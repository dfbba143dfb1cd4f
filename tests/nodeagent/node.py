"""An agent as a process of its own, and small clients of its sockets: what the tests of the shell drive."""

from __future__ import annotations

import contextlib
import itertools
import mmap
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np
import psutil

from contracts.channel import Channel, connect
from contracts.errors import from_wire
from contracts.functions import Function, FunctionClass, ModelFormat, ModelRef, Share
from contracts.status import FunctionStatus, NodeStatus
from contracts.units import MIB, S
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

REPOSITORY = Path(__file__).parents[2]
PATIENCE_S = 60.0
T = TypeVar("T")


def eventually(probe: Callable[[], T], what: str) -> T:
    """The first true value of `probe`; AssertionError after `PATIENCE_S`."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        found = probe()
        if found:
            return found
        assert time.monotonic() < deadline, f"{what} did not happen within {PATIENCE_S:.0f} s"
        time.sleep(0.01)


def function(name: str, source: str, **settings: object) -> Function:
    """A function of the fake loader."""
    settings.setdefault("share", Share(50, 1000))
    return Function(name=name, model=ModelRef(ModelFormat.TORCH_EXPORT, f"file:///{source}"), **settings)  # type: ignore[arg-type]


def best_effort(name: str, source: str) -> Function:
    """A best-effort function of the fake loader."""
    return function(name, source, cls=FunctionClass.BEST_EFFORT)


class Control:
    """A blocking control connection."""

    def __init__(self, run_dir: Path) -> None:
        self.channel = Channel(connect(str(run_dir / "control.sock")), Reply)
        self._ids = itertools.count(1)

    def ask(self, kind: type[Message], *fields: object) -> NodeStatus | None:
        """One message and its reply; the reply's error is raised."""
        self.channel.send(kind(next(self._ids), *fields))
        received = self.channel.receive()
        assert received is not None, "the agent closed the control connection"
        reply = received[0]
        assert isinstance(reply, Reply)
        if reply.error is not None:
            raise from_wire(*reply.error)
        return reply.status

    def declare(self, *functions: Function) -> None:
        """Declares functions, one after another."""
        for each in functions:
            self.ask(Declare, each)

    def remove(self, key: str) -> None:
        """Removes a function."""
        self.ask(Remove, key)

    def share(self, key: str, share: Share) -> None:
        """Changes a share."""
        self.ask(SetShare, key, share)

    def grant(self, *functions: str, pid: int | None = None) -> None:
        """Grants this process (or `pid`) functions, all if none is named."""
        self.ask(Grant, os.getpid() if pid is None else pid, functions)

    def status(self) -> NodeStatus:
        """The node's status."""
        status = self.ask(GetStatus)
        assert status is not None
        return status

    def function(self, key: str) -> FunctionStatus:
        """One function's status."""
        return next(each for each in self.status().functions if each.key == key)


class Predictor:
    """A blocking predictor whose segment holds one input and one output of each id."""

    def __init__(self, run_dir: Path, segment_bytes: int = MIB) -> None:
        self.fd = os.memfd_create("test-segment", os.MFD_ALLOW_SEALING)
        os.ftruncate(self.fd, segment_bytes)
        self.memory = mmap.mmap(self.fd, segment_bytes)
        self.channel = Channel(connect(str(run_dir / "agent.sock")), ToPredictor)
        self.channel.send(Hello(PROTOCOL_VERSION, segment_bytes), [self.fd])
        self.outcomes: dict[int, Answer | Failed] = {}
        self.notices: list[Message] = []
        self._ids = itertools.count(1)

    def batch(self, key: str, *parts: np.ndarray, timeout_ns: int = 60 * S) -> Submit:
        """A Submit of rows of four numbers, its inputs placed in the segment."""
        number = next(self._ids)
        at = number * 4096 % len(self.memory)
        placed = []
        for rows in parts:
            array = np.ascontiguousarray(rows, "<f4")
            self.memory[at : at + array.nbytes] = array.tobytes()
            x = TensorRef("x", "FP32", array.shape, at, array.nbytes)
            placed.append(Part(len(array), (x,), (TensorRef("y", "FP32", array.shape, at + 2048, array.nbytes),)))
            at += array.nbytes
        now_ns = time.monotonic_ns()
        return Submit(number, key, tuple(placed), now_ns + timeout_ns // 2, now_ns + timeout_ns)

    def submit(self, key: str, *parts: np.ndarray, timeout_ns: int = 60 * S) -> Submit:
        """Sends a batch."""
        batch = self.batch(key, *parts, timeout_ns=timeout_ns)
        self.channel.send(batch)
        return batch

    def receive(self) -> bool:
        """Takes in one message; False at the end of the stream."""
        received = self.channel.receive()
        if received is None:
            return False
        message = received[0]
        if isinstance(message, Answer | Failed):
            assert message.id not in self.outcomes, f"{message.id} was answered twice"
            self.outcomes[message.id] = message
        else:
            self.notices.append(message)
        return True

    def outcome(self, batch: Submit) -> Answer | Failed:
        """The outcome of a batch, waited for."""
        while batch.id not in self.outcomes:
            assert self.receive(), "the agent closed the connection"
        return self.outcomes[batch.id]

    def closed(self) -> bool:
        """Waits until the agent closes the connection."""
        with contextlib.suppress(ConnectionResetError):
            while self.receive():
                pass
        return True

    def result(self, batch: Submit) -> list[np.ndarray]:
        """What lies in the outputs of a batch, part by part."""
        refs = [part.outputs[0] for part in batch.parts]
        return [np.frombuffer(self.memory, "<f4", ref.nbytes // 4, ref.offset).reshape(ref.shape) for ref in refs]

    def call(self, key: str, *parts: np.ndarray) -> list[np.ndarray]:
        """Submits a batch and returns its answer; the error of a Failed is raised."""
        batch = self.submit(key, *parts)
        outcome = self.outcome(batch)
        if isinstance(outcome, Failed):
            raise from_wire(outcome.kind, outcome.message, outcome.retry_after_ms)
        return self.result(batch)

    def close(self) -> None:
        """Ends the connection."""
        self.channel.close()
        os.close(self.fd)


class Node:
    """An agent process on a run dir of its own; `module` is the fake agent or the real one."""

    def __init__(self, run_dir: Path, *arguments: str, module: str = "tests.nodeagent.fake_agent", memory: str = "1Mi", host: str = "8Mi") -> None:
        self.run_dir = run_dir
        command = [sys.executable, "-m", module, "--run-dir", str(run_dir), "--device-memory", memory, "--host-memory", host]
        if "--device" not in arguments:
            command += ["--device", "cpu:0"]
        # No pipe: an agent that writes much must not wait for a test that reads nothing.
        self._log = os.memfd_create("test-agent-log")
        self.process = subprocess.Popen([*command, *arguments], cwd=REPOSITORY, stderr=self._log)

    def ready(self) -> Node:
        """Waits until it answers. Connecting proves nothing: a child of a killed agent may hold the old socket until it runs its own program."""

        def answers() -> bool:
            assert self.process.poll() is None, self.read_log()
            try:
                control = Control(self.run_dir)
            except OSError:
                return False
            try:
                return control.status().pid == self.process.pid
            except (OSError, AssertionError):
                return False
            finally:
                control.channel.close()

        eventually(answers, "the control socket")
        return self

    @property
    def store(self) -> Path:
        """Its host store."""
        from nodeagent.shell.hoststore import store_folder

        return store_folder(self.run_dir)

    def read_log(self) -> str:
        """All that it wrote so far."""
        return os.pread(self._log, os.fstat(self._log).st_size, 0).decode()

    def children(self) -> list[psutil.Process]:
        """Its processes: fork server, lanes (as children of the fork server), loader."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.wait()

    def remove(self) -> None:
        """Ends it, if it runs, and removes what it left."""
        self.kill()
        os.close(self._log)
        shutil.rmtree(self.store, ignore_errors=True)

    def terminate(self) -> int:
        """SIGTERM; the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE_S)


@contextlib.contextmanager
def short_folder() -> Iterator[Path]:
    """A folder whose path leaves room for a socket's name."""
    with tempfile.TemporaryDirectory(prefix="sluice-", dir="/tmp") as folder:
        yield Path(folder)
