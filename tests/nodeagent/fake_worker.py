"""A fork server and lanes at the seam of `predictor.worker`, without torch: copies weights into the slab and adds their first number to each input.

What a model's options ask for: `fault=error` fails the batch, `fault=crash` kills the lane, `fault=once` kills the first lane that runs it,
`fault=hang` never ends, `fault=attach` fails the attach, `fault=unpinned` finds that the weights cannot be pinned, `fault=lie` answers for another
batch; `gate=FILE` waits for a file, `pin=FILE` is pinned only once there is one, `told=FILE` notes each attach in a file. A lane of `LYING_SM`
percent proves another cap; on a fake GPU it reads back all SMs. There a lane of `FAST_SM` percent computes faster than its SMs allow, and one of
`STILLBORN_SM` ends as it starts.
"""

from __future__ import annotations

import json
import mmap
import os
import signal
import socket
import threading
import time
from pathlib import Path

import numpy as np

from contracts.artifact import WeightIndex, decode_index
from contracts.channel import Channel
from contracts.lane_page import LanePage
from contracts.lane_wire import (
    Attach,
    Attached,
    BatchDone,
    BatchPaused,
    Copy,
    CopyGrant,
    CopyProgress,
    Detach,
    LaneReady,
    MapSegment,
    Resume,
    Run,
    Spawn,
    ToLaneCopy,
    ToLaneRun,
    UnmapSegment,
)
from contracts.wire import Message
from tests.fakes import gpu

LYING_SM = 13
FAST_SM = 17
STILLBORN_SM = 19
_WAIT_S = 20.0


class FakeLane:
    """One lane on the four descriptors of its Spawn."""

    def __init__(self, spawn: Spawn, fds: list[int]) -> None:
        self._spawn = spawn
        self._runs = Channel(socket.socket(fileno=fds[0]), ToLaneRun)
        self._copies = Channel(socket.socket(fileno=fds[1]), ToLaneCopy)
        self._slab = mmap.mmap(os.open(spawn.slab_handle, os.O_RDWR) if spawn.slab_handle else fds[2], spawn.slab_bytes)
        self._page = LanePage(fds[3])
        self._functions: dict[str, tuple[WeightIndex, int]] = {}
        self._arrived: dict[int, int] = {}
        self._copying: dict[int, tuple[str, int]] = {}
        self._changed = threading.Condition()
        self._saying = threading.Lock()
        self._segments: dict[int, mmap.mmap] = {}

    def serve(self) -> None:
        """Runs until the agent closes a channel."""
        threading.Thread(target=self._copy_until_the_end, daemon=True).start()
        self._runs.send(self._proof())
        while (received := self._runs.receive()) is not None:
            message, fds = received
            if isinstance(message, MapSegment):
                self._segments[message.segment] = mmap.mmap(fds[0], message.nbytes)
                os.close(fds[0])
            elif isinstance(message, UnmapSegment):
                del self._segments[message.segment]
            elif isinstance(message, Run):
                self._run(message)

    def _proof(self) -> LaneReady:
        spawn = self._spawn
        lies, fast = spawn.sm_percent == LYING_SM, spawn.sm_percent == FAST_SM
        if not spawn.slab_handle:
            return LaneReady(spawn.lane, os.getpid(), 100 if lies else spawn.sm_percent)
        os.environ.update(spawn.environment)
        if spawn.sm_percent == STILLBORN_SM:
            os._exit(1)
        joined = gpu.sms()
        sms = spawn.lane_sms if spawn.backend == "green" else joined
        return LaneReady(spawn.lane, os.getpid(), spawn.sm_percent, gpu.SMS if lies else sms, 100.0 if fast else 100 * sms / gpu.SMS)

    def _copy_until_the_end(self) -> None:
        try:
            self._serve_copies()
        finally:
            os._exit(0)

    def _serve_copies(self) -> None:
        while (received := self._copies.receive()) is not None:
            message, fds = received
            if isinstance(message, Attach):
                index = decode_index(message.index)
                with self._changed:
                    self._functions[message.function] = (index, fds[0])
                    self._changed.notify_all()
                threading.Thread(target=self._attach, args=(message.function, self._options(index)), daemon=True).start()
            elif isinstance(message, Detach):
                os.close(self._functions.pop(message.function)[1])
            elif isinstance(message, Copy):
                self._copying[message.copy] = (message.function, message.offset)
                self._advance(message.copy, message.until_bytes)
            elif isinstance(message, CopyGrant):
                self._advance(message.copy, message.until_bytes)

    def _attach(self, name: str, options: dict[str, str]) -> None:
        if "told" in options:
            with open(options["told"], "a") as told:
                told.write(f"{name}\n")
        deadline = time.monotonic() + _WAIT_S
        while "pin" in options and not Path(options["pin"]).exists() and time.monotonic() < deadline:
            time.sleep(0.001)
        fault = options.get("fault")
        self._say(Attached(name, "cannot be built" if fault == "attach" else "", pinned=fault != "unpinned"))

    def _say(self, message: Message) -> None:
        with self._saying:
            self._copies.send(message)

    def _advance(self, copy: int, until: int) -> None:
        name, offset = self._copying[copy]
        at = self._arrived.get(copy, 0)
        data = os.pread(self._functions[name][1], until - at, at)
        assert len(data) == until - at, "the weight file is cut short"
        self._slab[offset + at : offset + until] = data
        with self._changed:
            self._arrived[copy] = until
            self._changed.notify_all()
        self._say(CopyProgress(copy, until))

    def _run(self, run: Run) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: run.function in self._functions, _WAIT_S)
            index, _ = self._functions[run.function]
            assert self._changed.wait_for(lambda: not run.copy or self._arrived.get(run.copy, 0) == index.total_bytes, _WAIT_S)
        options = self._options(index)
        started_ns = time.monotonic_ns()
        error = self._misbehave(options, run)
        if "gate" in options:
            self._wait_at_gate(run, Path(options["gate"]))
        if error is None:
            value = np.frombuffer(self._slab, "<f4", 1, run.offset)[0]
            for part in run.parts:
                segment = self._segments[run.segment]
                x, y = part.inputs[0], part.outputs[0]
                rows = np.frombuffer(segment, "<f4", 4 * part.rows, x.offset)
                np.frombuffer(segment, "<f4", 4 * part.rows, y.offset)[:] = rows + value
        self._runs.send(BatchDone(run.batch, time.monotonic_ns() - started_ns, 0, error))

    def _misbehave(self, options: dict[str, str], run: Run) -> tuple[str, str] | None:
        fault = options.get("fault")
        if fault == "error":
            return "ExecutionError", "the model failed"
        if fault == "crash":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "once" and not Path(options["mark"]).exists():
            Path(options["mark"]).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        while fault == "hang":
            signal.pause()
        if fault == "lie":
            self._runs.send(BatchDone(run.batch + 1000, 1, 0))
        return None

    def _wait_at_gate(self, run: Run, gate: Path) -> None:
        deadline = time.monotonic() + _WAIT_S
        while not gate.exists() and time.monotonic() < deadline:
            if run.preemptible and self._page.pause_batch == run.batch:
                self._runs.send(BatchPaused(run.batch, 1000))
                while (received := self._runs.receive()) is not None and not isinstance(received[0], Resume):
                    pass
                if received is None:
                    os._exit(0)
            time.sleep(0.001)

    def _options(self, index: WeightIndex) -> dict[str, str]:
        return dict(json.loads(index.program.config))


def main() -> None:
    """The fork server on standard input."""
    channel = Channel(socket.socket(fileno=os.dup(0)), Spawn)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while (received := channel.receive()) is not None:
        spawn, fds = received
        assert isinstance(spawn, Spawn)
        if os.fork() == 0:
            channel.close()
            try:
                FakeLane(spawn, fds).serve()
            finally:
                os._exit(0)
        for fd in fds:
            os.close(fd)


if __name__ == "__main__":
    main()
