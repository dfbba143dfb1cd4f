"""The slab holder: one process for each CUDA device, which owns the device's memory for weights and lends it to lanes by a handle.

Speaks with the agent on a socket: Hold in, SlabReady out. It measures what others could not without competing for the device: how fast pinned memory
is copied, from which size of piece on, and how long the occupancy kernel takes on all SMs. Where other devices' lanes are to read the slab, it seals
it. It lives until the socket ends, or until its context is
broken: then the slab is lost, and its end says so. Never runs a model, never reads or writes the slab once lanes have it.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
import warnings

import torch

from contracts.channel import Channel
from contracts.errors import ProtocolError, Unavailable
from contracts.functions import FunctionClass
from contracts.lane_wire import Hold, SlabReady
from contracts.units import MIB, S, format_bytes
from predictor.worker.devices import driver as seam
from predictor.worker.devices import seal
from predictor.worker.devices.proof import occupancy_ns

_BEAT_S = 1.0
_PIECES = tuple(size * MIB for size in (1, 2, 4, 8, 16, 32))
_SAMPLE_BYTES = 128 * MIB
_KNEE = 0.97
_REPEATS = 5
_GRANULARITY = 2 * MIB
_NS_PER_MS = 1_000_000


def main() -> None:
    """Serves the connected stream socket that `--socket` names."""
    parser = argparse.ArgumentParser(
        prog="python -m predictor.worker.devices.holder", description="Holds a CUDA device's slab; started by the agent."
    )
    parser.add_argument("--socket", type=int, default=0, metavar="FD", help="a connected Unix stream socket (default: standard input)")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.filterwarnings("ignore", "The given buffer is not writable")
    channel = Channel(socket.socket(fileno=os.dup(parser.parse_args().socket)), Hold)
    received = channel.receive()
    if received is not None:
        hold = received[0]
        assert isinstance(hold, Hold)
        serve(channel, hold)


def serve(channel: Channel, hold: Hold) -> None:
    """Takes the memory, says what it is, and keeps it. SystemExit when the context is broken; ProtocolError when anything more is asked."""
    if hold.cpus:
        os.sched_setaffinity(0, hold.cpus)
    driver = seam.connect("quota", FunctionClass.BEST_EFFORT, 0, 0)
    whole_ns = occupancy_ns(driver)
    driver.trim()
    memory = take(driver, hold)
    nbytes = memory.numel() - _seal_bytes(hold)
    slab = memory[:nbytes]
    bytes_per_s, piece_bytes = link_speed(driver, slab)
    if hold.seal:
        seal.write(driver, memory[nbytes:], hold.seal)
    handle = driver.export(memory)
    channel.send(SlabReady(hold.device, driver.name, driver.sms, handle, nbytes, bytes_per_s, piece_bytes, whole_ns))
    while not channel.waiting(_BEAT_S):
        if not driver.alive():
            sys.exit(f"the context on {hold.device} is broken: its slab is lost")
    if channel.receive() is not None:
        raise ProtocolError("a slab holder is asked once")


def take(driver: seam.Driver, hold: Hold) -> torch.Tensor:
    """The memory of slab and seal; Unavailable when it does not fit beside what must stay free."""
    free = driver.free_bytes() - _seal_bytes(hold)
    nbytes = hold.nbytes or (free - hold.reserve_bytes) // _GRANULARITY * _GRANULARITY
    if not 0 < nbytes <= free:
        raise Unavailable(
            f"{hold.device} has {format_bytes(free)} free, which does not hold {format_bytes(max(nbytes, 0))} of weights "
            f"with {format_bytes(hold.reserve_bytes)} kept free: use another --device-memory"
        )
    return driver.allocate(nbytes + _seal_bytes(hold))


def _seal_bytes(hold: Hold) -> int:
    return seal.BYTES if hold.seal else 0


def link_speed(driver: seam.Driver, slab: torch.Tensor) -> tuple[int, int]:
    """(bytes per second of pinned copies into the slab, the smallest piece that is copied within 3 % of that)."""
    nbytes = min(_SAMPLE_BYTES, slab.numel())
    host = driver.pinned(nbytes)
    speeds = {piece: max(timed_copies(driver, slab, host, piece) for _ in range(_REPEATS)) for piece in _PIECES if piece <= nbytes} or {
        nbytes: timed_copies(driver, slab, host, nbytes)
    }
    best = max(speeds.values())
    return best, min(piece for piece, speed in speeds.items() if speed >= _KNEE * best)


def timed_copies(driver: seam.Driver, target: torch.Tensor, source: torch.Tensor, piece: int) -> int:
    """Bytes per second of copying `source` piece by piece with an event after each, as lanes do."""
    begun, ended = driver.event(timing=True), driver.event(timing=True)
    begun.record(driver.copies)
    for start in range(0, source.numel(), piece):
        end = min(start + piece, source.numel())
        driver.copy(target[start:end], source[start:end], driver.copies)
        driver.event().record(driver.copies)
    ended.record(driver.copies)
    ended.synchronize()
    return round(source.numel() * S / max(1.0, begun.elapsed_time(ended) * _NS_PER_MS))


if __name__ == "__main__":
    main()
