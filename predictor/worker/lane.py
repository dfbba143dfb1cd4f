"""The lane process: one SM cap on one device, one batch at a time. Receive, run, report.

Owns the process, its two channels and its threads: the main thread serves the run channel, a second copies weights, two more make attached functions
ready and pin them, and where copies outlive the call that issues them, a fifth follows them. It obeys the agent and decides nothing; when that goes,
so does it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

import torch

from contracts.channel import Channel
from contracts.errors import ProtocolError, SluiceError
from contracts.lane_page import LanePage
from contracts.lane_wire import (
    Attach,
    BatchPaused,
    Copy,
    CopyGrant,
    Detach,
    LaneReady,
    MapPeer,
    MapSegment,
    PeerMapped,
    Resume,
    Run,
    Spawn,
    ToLaneCopy,
    ToLaneRun,
    UnmapPeer,
    UnmapSegment,
)
from contracts.wire import Message
from predictor.worker.devices import open_device
from predictor.worker.executor import Executor
from predictor.worker.functions import Functions
from predictor.worker.memory import ActivationBound
from predictor.worker.segments import Segments
from predictor.worker.swap import SwapEngine, Transfer

_SWITCH_INTERVAL_S = 0.0005
_QUIET_S = 0.005
"""For how long nothing must have come before work that can wait is taken up."""


class Lane:
    """A lane as its Spawn describes it, on the descriptors that came along: run channel, copy channel, slab, lane page."""

    def __init__(self, spawn: Spawn, fds: list[int]) -> None:
        run_fd, copy_fd, slab_fd, page_fd = fds
        self._spawn = spawn
        self._runs = Channel(socket.socket(fileno=run_fd), ToLaneRun)
        self._copies = Channel(socket.socket(fileno=copy_fd), ToLaneCopy)
        self._copies_lock = threading.Lock()
        self._idle = False
        self._draining = False
        self._device = device = open_device(spawn, slab_fd)
        bound = ActivationBound(spawn.activation_bytes if device.host_activations else 0)
        self._segments = Segments()
        self._functions = Functions(device, bound, self._report)
        self._swap = SwapEngine(device, self._report)
        self._executor = Executor(device, self._functions, self._segments, bound, LanePage(page_fd), self._pause)
        os.close(slab_fd)
        os.close(page_fd)

    def serve(self) -> NoReturn:
        """Serves until the agent goes, or until SIGTERM and the end of the batch in hand."""
        signal.signal(signal.SIGTERM, self._on_sigterm)
        torch.set_num_threads(self._spawn.threads)
        sys.setswitchinterval(_SWITCH_INTERVAL_S)
        threads = [self._serve_copies, self._functions.prepare, self._functions.pin]
        if self._device.asynchronous:
            threads.append(self._swap.follow)
        for work in threads:
            threading.Thread(target=_fatal()(work), daemon=True).start()
        proof = self._device.proof
        self._runs.send(LaneReady(self._spawn.lane, os.getpid(), self._spawn.sm_percent, proof.sms, proof.measured_sm_percent))
        while True:
            message, fds = self._receive()
            match message:
                case Run():
                    self._runs.send(self._executor.run(message))
                case Resume():
                    pass
                case _:
                    self._map(message, fds)

    def _map(self, message: Message, fds: list[int]) -> None:
        match message:
            case MapSegment(segment=segment, nbytes=nbytes):
                self._segments.map(segment, fds[0], nbytes)
            case UnmapSegment(segment=segment):
                self._segments.unmap(segment)
            case _:
                raise ProtocolError(f"a {type(message).__name__} came while a batch was paused")

    def _pause(self, batch: int, gpu_ns: int) -> None:
        """Stands still with a batch in hand until it is resumed. What goes wrong here is no model's error, though a model is on the stack."""
        with _fatal():
            self._runs.send(BatchPaused(batch, gpu_ns))
            while (received := self._runs.receive()) is not None:
                if isinstance(received[0], Resume):
                    return
                self._map(*received)
            os._exit(0)

    def _serve_copies(self) -> None:
        """The copy thread: one message after another, each to its end."""
        torch.set_num_threads(1)
        while (received := self._copies.receive()) is not None:
            message, fds = received
            match message:
                case Attach(function=name):
                    self._detach(name)
                    self._functions.attach(message, fds[0])
                case Detach(function=name):
                    self._detach(name)
                case MapPeer():
                    self._map_peer(message, fds[0])
                case UnmapPeer(device=device):
                    self._device.unmap_peer(device)
                case Copy(copy=copy, until_bytes=until):
                    self._begin(message)
                    self._swap.advance(copy, until)
                case CopyGrant(copy=copy, until_bytes=until):
                    self._swap.advance(copy, until)
        os._exit(0)

    def _begin(self, message: Copy) -> None:
        copy, function = message.copy, self._functions.get(message.function)
        if function is None:
            raise ProtocolError(f"copy {copy} is of function {message.function!r}, which is not attached")
        if function.transfer is not None:
            self._swap.cancel(function.transfer)
        weights = function.weights
        if message.source:
            slab, start = self._device.peer(message.source), message.source_offset
            end = start + weights.numel()
            if slab is None or not 0 <= start <= end <= slab.numel():
                raise ProtocolError(f"copy {copy} is of bytes {start} to {end} of {message.source}, which are not mapped here")
            weights = slab[start:end]
        transfer = Transfer(copy, weights, message.offset, message.source)
        self._swap.begin(transfer)
        self._functions.started(function, transfer)

    def _map_peer(self, peer: MapPeer, fd: int) -> None:
        """What cannot be mapped, or not be proven, is not used; only a device that no longer works ends the lane."""
        try:
            mapped = PeerMapped(peer.device, self._device.map_peer(peer, fd))
        except (SluiceError, RuntimeError, OSError, ValueError) as failure:
            self._device.survive(failure)
            mapped = PeerMapped(peer.device, 0, str(failure) or type(failure).__name__)
        finally:
            os.close(fd)
        self._report(mapped)

    def _detach(self, name: str) -> None:
        function = self._functions.detach(name)
        if function is not None and function.transfer is not None:
            self._swap.cancel(function.transfer)

    def _report(self, message: Message) -> None:
        """Sends on the copy channel, for the copy thread and those behind it."""
        with self._copies_lock:
            self._copies.send(message)

    def _receive(self) -> tuple[Message, list[int]]:
        """The next message while no batch is in hand; ends the process when the agent has gone, or on SIGTERM."""
        self._idle = True
        if self._draining:
            os._exit(0)
        while self._device.has_idle_work and not self._runs.waiting(_QUIET_S):
            self._device.work_idly()
        received = self._runs.receive()
        self._idle = False
        if received is None:
            os._exit(0)
        return received

    def _on_sigterm(self, signum: int, frame: FrameType | None) -> None:
        self._draining = True
        if self._idle:
            os._exit(0)


def serve(spawn: Spawn, fds: list[int]) -> NoReturn:
    """Makes this process a lane and never returns."""
    with _fatal():
        Lane(spawn, fds).serve()


@contextlib.contextmanager
def _fatal() -> Iterator[None]:
    """An error that is let through here, in whatever thread, ends the whole lane: the agent sees the end of its channels and replaces it."""
    try:
        yield
    except (BrokenPipeError, ConnectionResetError):
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
