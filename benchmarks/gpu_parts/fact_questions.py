"""What the decisions about GPUs had to leave open, as questions to a GPU: each starts the processes that it needs, and ends them.

The clients are processes of their own (`fact_client`), the MPS daemon and the slab's holder are the agent's own. An answer is a flat mapping of
figures and yes or no; what goes wrong is raised. Measures with what lanes use, and nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.node_parts.node import catalogued, running
from contracts.errors import SluiceError, Unavailable
from contracts.functions import Function, FunctionClass
from contracts.lane_wire import Hold, SlabReady
from contracts.units import GIB, MIB, MS
from models.samples import sample_inputs
from nodeagent.shell import backends
from nodeagent.shell.gpus import Gpu
from nodeagent.shell.holder import Holder
from nodeagent.shell.mps import MpsDaemon

_BYTES = 512 * MIB
_PERCENTS = (5, 10, 25, 50, 75, 90)
_HALF = 50
_ALONE_S = 1.5
_BUSY_KERNELS = 2000
_DEATH_S = 10.0
_PYTHON = sys.executable
_PIPE = "CUDA_MPS_PIPE_DIRECTORY"

Answer = dict[str, Any]


class Client:
    """One process on the GPU; `ask` gives what it found, Unavailable what it could not do."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.pid = process.pid

    async def ask(self, verb: str, *arguments: object) -> Any:
        """One thing after another."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(f"{json.dumps([verb, *arguments])}\n".encode())
            line = await self._process.stdout.readline()
        except OSError:
            line = b""
        if not line:
            raise Unavailable(f"the client ended at {verb!r} with exit code {await self._process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise Unavailable(f"{verb}: {answer['error']}")
        return answer["found"]

    async def ended(self, within_s: float) -> bool:
        """Whether it ends by itself within so many seconds."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._process.wait(), within_s)
        return self._process.returncode is not None

    async def end(self) -> None:
        """Kills it."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        # One that the driver holds up in the kernel does not go before the driver lets it.
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._process.wait(), _DEATH_S)


class Kept:
    """A client without MPS that one question leaves to the next: most of a question's time is torch's start."""

    def __init__(self) -> None:
        self.client: Client | None = None

    async def end(self) -> None:
        """Ends it: whoever asks next has a new one."""
        client, self.client = self.client, None
        if client is not None:
            await client.end()


@dataclass(frozen=True, slots=True)
class Stand:
    """The GPU that is asked, and what is started there. What is started ends with `stack`, but for the client that is kept."""

    gpu: Gpu
    stack: contextlib.AsyncExitStack
    kept: Kept
    control: tuple[str, ...] = ("nvidia-cuda-mps-control",)
    program: tuple[str, ...] = (_PYTHON, "-m", "benchmarks.gpu_parts.fact_client")
    holder: tuple[str, ...] = (_PYTHON, "-m", "predictor.worker.devices.holder")

    async def plain(self) -> Client:
        """The client that is kept."""
        if self.kept.client is None:
            self.kept.client = await self._start({}, "quota", 0, 0)
        return self.kept.client

    async def client(self, environment: Mapping[str, str] | None = None, backend: str = "quota", first: int = 0, sms: int = 0) -> Client:
        """A new one; it is opening the GPU when this returns."""
        client = await self._start(environment or {}, backend, first, sms)
        self.stack.push_async_callback(client.end)
        return client

    async def _start(self, environment: Mapping[str, str], backend: str, first: int, sms: int) -> Client:
        pipe = asyncio.subprocess.PIPE
        seen = {**os.environ, "CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": self.gpu.uuid, **environment}
        return Client(await asyncio.create_subprocess_exec(*self.program, backend, str(first), str(sms), stdin=pipe, stdout=pipe, env=seen))

    async def daemon(self) -> MpsDaemon:
        """A private MPS daemon that is ready."""
        folder = self.stack.enter_context(tempfile.TemporaryDirectory(prefix="facts-"))
        daemon = MpsDaemon(self.control, Path(folder), self.gpu.uuid)
        self.stack.push_async_callback(daemon.stop)
        await daemon.start()
        return daemon

    async def slab(self, environment: Mapping[str, str]) -> tuple[Holder, SlabReady]:
        """A holder and its slab of `_BYTES`."""
        holder = Holder(self.holder, {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": self.gpu.uuid, **environment})
        self.stack.push_async_callback(holder.stop)
        return holder, await holder.start(Hold("cuda:0", _BYTES, 0))

    def share(self, daemon: MpsDaemon, percent: int) -> dict[str, str]:
        """The environment of a lane of this size."""
        return daemon.environment | backends.choose(self.gpu, "").environment(percent, FunctionClass.LATENCY_SENSITIVE)


async def start(stand: Stand) -> Answer:
    """What the device is, and how long a process takes to be ready there."""
    begun = time.monotonic()
    client = await stand.plain()
    says: Answer = await client.ask("says")
    ready_s = time.monotonic() - begun
    return says | {"ready_s": ready_s, "libraries_s": await client.ask("warm"), "occupancy_ms": await client.ask("occupy") / MS}


async def pinning(stand: Stand) -> Answer:
    """Whether memory that is mapped read only can be pinned, and what pinning costs."""
    found: Answer = await (await stand.plain()).ask("pin", _BYTES)
    return found


async def copies_while_pinning(stand: Stand) -> Answer:
    """What copies lose while other memory is pinned."""
    found: Answer = await (await stand.plain()).ask("copy_while_pinning", _BYTES)
    return found


async def pieces(stand: Stand) -> Answer:
    """From which size on a piece is copied as fast as it gets."""
    found: Answer = await (await stand.plain()).ask("pieces", _BYTES // 4)
    return found


async def waiting(stand: Stand) -> Answer:
    """Sleeping or spinning at the end of a batch."""
    found: Answer = await (await stand.plain()).ask("wait", MIB // 4)
    return found


async def recording(stand: Stand) -> Answer:
    """How long the recording of a graph holds up a request."""
    client = await stand.plain()
    found = {source: await client.ask("record", f"{source}?seed=1") for source in ("resnet50", "bert-base")}
    return {f"{source}_{key}": value for source, one in found.items() for key, value in one.items()}


async def green(stand: Stand) -> Answer:
    """What green contexts alone give: the SMs and the speed of each size, one process after another at work."""
    return await _green(stand, {}, _PERCENTS)


async def green_graphs(stand: Stand) -> Answer:
    """Whether a graph that was recorded on a green context's stream keeps to its SMs: as slow as its eager run, and not as fast as the device."""
    whole, half = await stand.plain(), await _green_client(stand, {}, _HALF)
    found = {"whole": await whole.ask("graph", 7), "half": await half.ask("graph", 7)}
    return {f"{name}_{key}": value for name, one in found.items() for key, value in one.items()}


async def mps_start(stand: Stand) -> Answer:
    """How long daemon, holder and client take to start, and whether the server lists its clients."""
    began = time.monotonic()
    daemon = await stand.daemon()
    daemon_s, began = time.monotonic() - began, time.monotonic()
    holder, ready = await stand.slab(daemon.environment)
    holder_s, began = time.monotonic() - began, time.monotonic()
    client = await stand.client(stand.share(daemon, _HALF))
    await client.ask("says")
    listed = await daemon.clients()
    found = {"daemon_s": daemon_s, "holder_s": holder_s, "client_s": time.monotonic() - began, "lists_clients": {holder.pid, client.pid} <= listed}
    return found | {"listed": len(listed), "gb_per_s": ready.h2d_bytes_per_s / 1e9, "piece_mib": ready.piece_bytes / MIB}


async def mps_percent(stand: Stand) -> Answer:
    """How MPS rounds a percentage, what follows it, and the speed of each size, one process after another at work."""
    daemon = await stand.daemon()
    sizes = (*_PERCENTS, 100)
    clients = {percent: await stand.client(stand.share(daemon, percent)) for percent in sizes}
    says = {percent: await client.ask("says") for percent, client in clients.items()}
    took_ns = {percent: await client.ask("occupy") for percent, client in clients.items()}
    found: Answer = {}
    for percent in sizes:
        found |= {f"{percent}_{key}": says[percent][key] for key in ("multiprocessors", "affinity_sms")}
        found[f"{percent}_speed_percent"] = 100 * took_ns[100] / took_ns[percent]
    return found


async def together(stand: Stand) -> Answer:
    """How much longer a kernel takes beside one of another process: half and half under MPS, and without MPS, where processes take turns."""
    daemon = await stand.daemon()
    halves = [await stand.client(stand.share(daemon, _HALF)) for _ in range(2)]
    under = await _beside(halves)
    return {"mps_times_longer": under, "no_mps_times_longer": await _beside([await stand.plain(), await stand.client()])}


async def mps_green(stand: Stand) -> Answer:
    """Whether green contexts work under the daemon."""
    daemon = await stand.daemon()
    return await _green(stand, stand.share(daemon, 100), (25, 50))


async def slab(stand: Stand) -> Answer:
    """Whether clients of one daemon share a slab by its handle, and still do when one of them was terminated at work, and then killed."""
    daemon = await stand.daemon()
    _, ready = await stand.slab(daemon.environment)
    first, second = [await stand.client(stand.share(daemon, _HALF)) for _ in range(2)]
    open_s = [await client.ask("open", ready.handle.hex(), ready.nbytes) for client in (first, second)]
    await first.ask("fill", 0, _BYTES, 7)
    found: Answer = {"open_s": max(open_s), "shared": await second.ask("holds", 0, _BYTES, 7)}
    await first.ask("busy", _BUSY_KERNELS)
    began = time.monotonic()
    await daemon.terminate_client(first.pid)
    found["terminate_s"] = time.monotonic() - began
    found["valid_after_terminate"] = await _outcome(second.ask("holds", 0, _BYTES, 7))
    await first.end()
    return found | {"valid_after_kill": await _outcome(second.ask("holds", 0, _BYTES, 7)), "faulted": await daemon.faulted()}


async def fault(stand: Stand) -> Answer:
    """Who dies with a client that breaks its context, and how long it takes until another client works under a new daemon."""
    daemon = await stand.daemon()
    holder, ready = await stand.slab(daemon.environment)
    bad, good = [await stand.client(stand.share(daemon, _HALF)) for _ in range(2)]
    await good.ask("open", ready.handle.hex(), ready.nbytes)
    found: Answer = {"said": await _outcome(bad.ask("fault"))}
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(holder.died.wait(), _DEATH_S)
    found["neighbour_ended"] = await good.ended(_DEATH_S)
    found["neighbour_works"] = await _outcome(good.ask("works"))
    found |= {"holder_died": holder.died.is_set(), "server_died": daemon.died.is_set(), "server_faulted": await daemon.faulted()}
    began = time.monotonic()
    for ending in (bad.end, good.end, holder.stop, daemon.stop):
        await ending()
    found["ended_s"] = time.monotonic() - began
    again = await stand.daemon()
    await (await stand.client(stand.share(again, _HALF))).ask("occupy")
    return found | {"works_again_s": time.monotonic() - began}


async def recovery(stand: Stand) -> Answer:
    """A whole node: how long until its first answer, and how long until the next right one after a client broke all contexts of the GPU."""
    function = Function("facts", catalogued("mlp?seed=1"))
    part = sample_inputs(function.model, 1, seed=1)
    began = time.monotonic()
    async with running(GIB, (f"cuda:{stand.gpu.uuid}",)) as node, node.serving(function):
        first = await node.caller.call(function.key, part)
        found: Answer = {"first_answer_s": time.monotonic() - began}
        bad = await stand.client(_pipe_of_the_agents_daemon())
        await bad.ask("works")
        found["said"] = await _outcome(bad.ask("fault"))
        began, again = time.monotonic(), None
        while again is None or (not again.answer.cold and time.monotonic() < began + _DEATH_S):
            with contextlib.suppress(SluiceError):
                again = await node.caller.call(function.key, part)
        same = all((again.outputs[0][name] == array).all() for name, array in first.outputs[0].items())
        return found | {"lanes_died": again.answer.cold, "answers_again_s": time.monotonic() - began, "same_answer": bool(same)}


def _pipe_of_the_agents_daemon() -> dict[str, str]:
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "-f" in process.cmdline():
                return {_PIPE: process.environ()[_PIPE]}
    raise Unavailable("the agent runs no MPS daemon")


async def _green_client(stand: Stand, environment: Mapping[str, str], percent: int) -> Client:
    return await stand.client(environment, "green", 0, backends.choose(stand.gpu, "", "green").lane_sms(percent))


async def _green(stand: Stand, environment: Mapping[str, str], percents: tuple[int, ...]) -> Answer:
    whole = await stand.client(environment) if environment else await stand.plain()
    limits = backends.choose(stand.gpu, "", "green")
    possible = [percent for percent in percents if limits.refusal(percent) is None]
    clients = {percent: await _green_client(stand, environment, percent) for percent in possible}
    whole_ns = await whole.ask("occupy")
    found: Answer = {}
    for percent, client in clients.items():
        found |= {f"{percent}_asked": limits.lane_sms(percent), f"{percent}_sms": (await client.ask("says"))["sms"]}
        found[f"{percent}_speed_percent"] = 100 * whole_ns / await client.ask("occupy")
    return found


async def _beside(clients: list[Client]) -> float:
    """The times of both at once, beside those of each alone."""
    alone = [await client.ask("repeat", _ALONE_S) for client in clients]
    both = await asyncio.gather(*(client.ask("repeat", _ALONE_S) for client in clients))
    return float(max(now / before for now, before in zip(both, alone, strict=True)))


async def _outcome(asked: Awaitable[Any]) -> Any:
    """What was found; the reason where nothing was."""
    try:
        return await asked
    except Unavailable as error:
        return error.message


QUESTIONS: Mapping[Callable[[Stand], Awaitable[Answer]], float] = {
    start: 60.0,
    pinning: 40.0,
    copies_while_pinning: 30.0,
    pieces: 30.0,
    waiting: 30.0,
    recording: 40.0,
    green: 40.0,
    green_graphs: 40.0,
    mps_start: 60.0,
    mps_percent: 60.0,
    together: 60.0,
    mps_green: 40.0,
    slab: 60.0,
    fault: 90.0,
    recovery: 120.0,
}
"""In this order; each has so many seconds."""
