"""A real agent as a process (real fork server, lanes and loader), predictors on its socket, and the models' answers without Sluice."""

from __future__ import annotations

import contextlib
import functools
import itertools
import mmap
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import psutil
import torch

from contracts.channel import Channel, connect
from contracts.functions import Function, ModelFormat, ModelRef, Share
from contracts.units import MIB, S
from contracts.wire import PROTOCOL_VERSION, Answer, Failed, Hello, Message, Part, Submit, TensorRef, ToPredictor
from models.load import Loaded, load
from nodeagent.shell.hoststore import store_folder
from tests.faults import census
from tests.nodeagent.node import Control

ROOT = Path(__file__).parents[2]
PATIENCE_S = 120.0
FEATURES, CLASSES = 16, 4
SLOT = 1 << 12
T = TypeVar("T")


def until(probe: Callable[[], T], what: str | Callable[[], str]) -> T:
    """The first true value of `probe`; AssertionError after `PATIENCE_S`."""
    deadline = time.monotonic() + PATIENCE_S
    while not (found := probe()):
        assert time.monotonic() < deadline, f"not within {PATIENCE_S:.0f} s: {what if isinstance(what, str) else what()}"
        time.sleep(0.02)
    return found


def source(seed: int, width: int = 32, depth: int = 2) -> str:
    """A small network; its weights follow from the seed. Of width 256 and depth 3 they take about 0.5 MiB."""
    return f"mlp?features={FEATURES}&width={width}&depth={depth}&classes={CLASSES}&seed={seed}"


def function(name: str, source: str, **settings: object) -> Function:
    """A function of the catalogue."""
    settings.setdefault("share", Share(100, 1000))
    return Function(name=name, model=ModelRef(ModelFormat.CATALOG, source), **settings)  # type: ignore[arg-type]


@functools.cache
def _model(source: str) -> Loaded:
    torch.set_num_threads(1)
    return load(ModelRef(ModelFormat.CATALOG, source))


def expected(source: str, rows: np.ndarray) -> np.ndarray:
    """What the model gives for these rows as one batch, run directly in torch."""
    (scores,) = _model(source).run({"features": torch.from_numpy(rows)}).values()
    return scores.numpy()


def rows_of(number: int, rows: int = 1) -> np.ndarray:
    """Inputs that no other number has."""
    return np.random.default_rng(number).standard_normal((rows, FEATURES), dtype=np.float32)


class Agent:
    """One agent process. `prefix` goes before its command line."""

    def __init__(self, folder: Path, *arguments: str, memory: str = "2Mi", host: str = "64Mi", prefix: Sequence[str] = ()) -> None:
        self.run_dir = folder / "run"
        self.store = store_folder(self.run_dir)
        self.mark = f"{folder}"
        self.log = folder / f"agent-{uuid.uuid4().hex[:6]}.log"
        command = [*prefix, sys.executable, "-m", "nodeagent", "--run-dir", str(self.run_dir), "--device-memory", memory, "--host-memory", host]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, "--device", "cpu:0", *arguments], cwd=ROOT, stderr=log, env={**os.environ, census.MARK: self.mark}
            )
        until(self._connects, lambda: f"the control socket\n{self.log.read_text()}")

    def _connects(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        try:
            connect(str(self.run_dir / "control.sock")).close()
        except OSError:
            return False
        return True

    def processes(self, role: str) -> list[psutil.Process]:
        """Its live processes of one role."""
        return census.of_role(self.mark, role)

    def count(self) -> census.Census:
        """A census."""
        return census.take(self.mark, self.store)

    def settle(self, functions: int) -> None:
        """Takes the census that later ones are compared with, without the loader. `functions` are declared."""
        self.functions = functions
        census.end_loader(self.mark)
        self.before = self.count()

    def leaks_nothing(self) -> None:
        """Waits until the node holds what it held when it had settled, and no more."""
        census.end_loader(self.mark)

        def leaked() -> str:
            return self.count().leaked_since(self.before, self.functions)

        until(lambda: not leaked(), lambda: f"leaked:\n{leaked()}\n{self.log.read_text()}")

    def kill(self) -> None:
        """SIGKILL, and waits until all its processes have gone."""
        self.process.kill()
        self.process.wait()
        until(lambda: not census.family(self.mark), lambda: f"processes outlive the agent: {census.family(self.mark)}")

    def end(self) -> None:
        """Ends it if it runs, and removes its store."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(PATIENCE_S)
            finally:
                self.kill()
        shutil.rmtree(self.store, ignore_errors=True)


class Predictor:
    """A predictor of this process. Every submitted id is answered once at most, or the test fails."""

    def __init__(self, run_dir: Path, segment_bytes: int = 4 * MIB, keys: dict[str, str] | None = None) -> None:
        """`keys`: function key -> source."""
        self.keys = {} if keys is None else keys
        self.fd = os.memfd_create("sluice-segment", os.MFD_ALLOW_SEALING)
        os.ftruncate(self.fd, segment_bytes)
        self.memory = mmap.mmap(self.fd, segment_bytes)
        sock = connect(str(run_dir / "agent.sock"))
        sock.settimeout(PATIENCE_S)
        self.channel = Channel(sock, ToPredictor)
        self.channel.send(Hello(PROTOCOL_VERSION, segment_bytes), [self.fd])
        self.outcomes: dict[int, Answer | Failed] = {}
        self.ids = itertools.count(1)

    def batch(self, key: str, *parts: np.ndarray, timeout_s: float = PATIENCE_S) -> Submit:
        """A Submit whose inputs lie in the segment, each part's output behind its input."""
        number = next(self.ids)
        at = number * SLOT % (len(self.memory) - SLOT)
        placed = []
        for rows in parts:
            self.memory[at : at + rows.nbytes] = rows.tobytes()
            x = TensorRef("features", "FP32", rows.shape, at, rows.nbytes)
            room = len(rows) * CLASSES * 4
            self.memory[at + rows.nbytes : at + rows.nbytes + room] = b"\xff" * room
            placed.append(Part(len(rows), (x,), (TensorRef("scores", "FP32", (len(rows), CLASSES), at + rows.nbytes, room),)))
            at += rows.nbytes + room
        now_ns = time.monotonic_ns()
        return Submit(number, key, tuple(placed), now_ns + int(timeout_s * S) // 2, now_ns + int(timeout_s * S))

    def submit(self, key: str, *parts: np.ndarray, timeout_s: float = PATIENCE_S) -> Submit:
        """Sends a batch."""
        batch = self.batch(key, *parts, timeout_s=timeout_s)
        self.channel.send(batch)
        return batch

    def receive(self) -> bool:
        """Takes in one message; False at the end of the stream."""
        try:
            received = self.channel.receive()
        except ConnectionResetError:
            return False
        if received is None:
            return False
        message: Message = received[0]
        if isinstance(message, Answer | Failed):
            assert message.id not in self.outcomes, f"{message.id} was answered twice"
            self.outcomes[message.id] = message
        return True

    def outcome(self, batch: Submit) -> Answer | Failed:
        """The outcome of a batch, waited for."""
        while batch.id not in self.outcomes:
            assert self.receive(), "the agent closed the connection"
        return self.outcomes[batch.id]

    def check(self, batch: Submit, source: str) -> bool:
        """Waits for the outcome; True for an answer, which must be right to the last bit, False for a failure."""
        if isinstance(self.outcome(batch), Failed):
            return False
        inputs = [self._read(part.inputs[0]) for part in batch.parts]
        outputs = np.concatenate([self._read(part.outputs[0]) for part in batch.parts])
        np.testing.assert_array_equal(outputs, expected(source, np.concatenate(inputs)))
        return True

    def serves(self, key: str, source: str) -> bool:
        """One batch of three parts; whether it was answered, and rightly."""
        return self.check(self.submit(key, *(rows_of(number, 1 + number % 2) for number in range(3))), source)

    def _read(self, ref: TensorRef) -> np.ndarray:
        return np.frombuffer(self.memory, "<f4", ref.nbytes // 4, ref.offset).reshape(ref.shape).copy()

    def close(self) -> None:
        """Ends the connection."""
        self.channel.close()
        os.close(self.fd)


@contextlib.contextmanager
def connected(agent: Agent) -> Iterator[tuple[Control, Predictor]]:
    """A control connection and a predictor that may use every function."""
    control = Control(agent.run_dir)
    control.grant()
    predictor = Predictor(agent.run_dir)
    assert predictor.receive()
    try:
        yield control, predictor
    finally:
        predictor.close()
        control.channel.close()
