"""A whole node for a benchmark: a real agent process with fork server and lanes, a control client, and a predictor's end of `agent.sock`.

Owns the processes, the run directory and the weight store, and removes them however the benchmark ends. Measures nothing; speaks no HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from contracts.errors import SluiceError, Unavailable
from contracts.functions import Function, ModelFormat, ModelRef
from contracts.status import FunctionStatus, NodeStatus
from contracts.units import GIB, MIB, S
from contracts.wire import Answer, FunctionInfo
from nodeagent.shell.hoststore import store_folder
from predictor.agent_client import AgentClient, Batch
from predictor.segment import Array, Placement
from predictor.tensors import NUMPY
from sluice.control import Client
from sluice.processes import Child, describe_exit
from sluice.rundir import RunDir

_START_S = 240.0
_GRACE_S = 20.0
_POLL_S = 0.02
_TIMEOUT_NS = 120 * S


def catalogued(source: str) -> ModelRef:
    """A model of the catalogue."""
    return ModelRef(ModelFormat.CATALOG, source)


@dataclass(frozen=True, slots=True)
class Reply:
    """One answered batch: copies of the outputs of each part, what the agent said of it, and when it was sent and answered (monotonic ns)."""

    outputs: tuple[Mapping[str, Array], ...]
    answer: Answer
    sent_ns: int
    done_ns: int

    @property
    def total_ns(self) -> int:
        """From the inputs' way into shared memory to the answer."""
        return self.done_ns - self.sent_ns


class Caller:
    """A predictor without HTTP and without batching: what is called is submitted as it is, at once."""

    def __init__(self, agent_path: Path, segment_bytes: int) -> None:
        self._changed = asyncio.Event()
        self._client = AgentClient(str(agent_path), segment_bytes, self)
        self._client.start()

    async def ready(self, key: str) -> None:
        """Returns when the agent has announced the function as ready."""
        while not self._client.live(key):
            self._changed.clear()
            await self._changed.wait()

    async def call(self, key: str, *parts: Mapping[str, Array], slo_deadline_ns: int | None = None) -> Reply:
        """Runs one batch of these parts (input name -> array, rows first); the agent's error is raised, Unavailable if the segment has no room."""
        sent_ns = time.monotonic_ns()
        timeout_ns = sent_ns + _TIMEOUT_NS
        signature = self._client.functions[key].signature
        assert signature is not None, "only a function that is ready is called"
        done: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        placements: list[Placement] = []
        rows: list[int] = []
        for part in parts:
            sizes = signature.bind({spec.name: (spec.dtype, part[spec.name].shape) for spec in signature.inputs})
            placement = self._client.place([(spec, part[spec.name]) for spec in signature.inputs], signature.output_shapes(sizes))
            if placement is None:
                for placed in placements:
                    self._client.release(placed)
                raise Unavailable("too many requests wait: the benchmark's segment is full")
            placements.append(placement)
            rows.append(sizes["batch"])

        def on_done(_: Batch, outcome: Answer | SluiceError) -> None:
            if done.cancelled():
                return
            if isinstance(outcome, Answer):
                done.set_result(outcome)
            else:
                done.set_exception(outcome)

        self._client.submit(Batch(key, placements, rows, slo_deadline_ns or timeout_ns, timeout_ns, on_done))
        try:
            answer = await done
            done_ns = time.monotonic_ns()
            outputs = tuple({ref.name: at.segment.view(ref, NUMPY[ref.dtype]).copy() for ref in at.outputs} for at in placements)
            return Reply(outputs, answer, sent_ns, done_ns)
        finally:
            if done.done() and not done.cancelled():
                for placement in placements:
                    self._client.release(placement)

    def close(self) -> None:
        """Ends the connection."""
        self._client.close()

    def on_function(self, info: FunctionInfo) -> None:
        """Listener of the AgentClient."""
        self._changed.set()

    def on_tokenizer(self, name: str, fd: int) -> None:
        """Nothing here sends text."""
        os.close(fd)

    def on_gone(self, key: str) -> None:
        """Listener of the AgentClient."""

    def on_retry(self, function: str) -> None:
        """Listener of the AgentClient."""


@dataclass(frozen=True, slots=True)
class Node:
    """A running node. `store` is the folder of its host weights, `threads` the compute threads of a lane."""

    control: Client
    caller: Caller
    store: Path
    threads: int

    @contextlib.asynccontextmanager
    async def serving(self, *functions: Function) -> AsyncIterator[None]:
        """Declares functions, waits until they can be called, and removes them at the end."""
        await asyncio.gather(*(self.control.declare(function) for function in functions))
        try:
            for function in functions:
                await self.caller.ready(function.key)
            yield
        finally:
            if not self.control.closed:
                await asyncio.gather(*(self.control.remove(function.key) for function in functions))

    async def status(self) -> NodeStatus:
        """The agent's status."""
        return await self.control.status()

    async def function(self, key: str) -> FunctionStatus:
        """One function's line of it."""
        return next(line for line in (await self.status()).functions if line.key == key)


@contextlib.asynccontextmanager
async def running(
    device_memory: int,
    devices: Sequence[str] = ("cpu:0",),
    threads: int = 1,
    segment_bytes: int = 64 * MIB,
    host_memory: int = 4 * GIB,
) -> AsyncIterator[Node]:
    """A node with these devices, each of `device_memory` bytes, on a run directory of its own; all of it is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="sluice-") as folder:
        path = Path(folder, "run")
        run_dir = RunDir(path, store_folder(path))
        arguments = ["--run-dir", str(path), "--device-memory", str(device_memory), "--host-memory", str(host_memory), "--threads", str(threads)]
        for device in devices:
            arguments += ["--device", device]
        agent: Child | None = None
        control: Client | None = None
        caller: Caller | None = None
        try:
            agent = Child("agent", [sys.executable, "-m", "nodeagent", *arguments], lambda _name, _line: None)
            control = await _connect(path, agent)
            await control.grant(os.getpid())
            caller = Caller(path / "agent.sock", segment_bytes)
            yield Node(control, caller, store_folder(path), threads)
        finally:
            if caller is not None:
                caller.close()
            if control is not None:
                control.close()
            if agent is not None:
                await agent.stop(_GRACE_S)
            run_dir.remove()


async def _connect(run_dir: Path, agent: Child) -> Client:
    deadline = time.monotonic() + _START_S
    while True:
        try:
            return Client(run_dir)
        except Unavailable:
            if agent.returncode is not None or time.monotonic() > deadline:
                state = "did not start" if agent.returncode is None else describe_exit(agent.returncode)
                raise Unavailable(f"the node agent {state}:\n" + "\n".join(agent.tail)) from None
        await asyncio.sleep(_POLL_S)
