"""A slab holder without CUDA: the slab is a memfd, its handle the path by which another process may open it while this one lives.

FAKE_HOLDER names a file: while it is there, holders end as they start.
"""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

from contracts.channel import Channel
from contracts.lane_wire import Hold, SlabReady
from tests.fakes import gpu


def main() -> int:
    channel = Channel(socket.socket(fileno=os.dup(0)), Hold)
    received = channel.receive()
    if received is None:
        return 0
    if os.environ.get("FAKE_HOLDER") and Path(os.environ["FAKE_HOLDER"]).exists():
        return 3
    hold = received[0]
    assert isinstance(hold, Hold)
    sms = gpu.sms()
    nbytes = hold.nbytes or gpu.TOTAL_BYTES - hold.reserve_bytes
    fd = os.memfd_create("fake-gpu-memory")
    os.ftruncate(fd, nbytes)
    channel.send(SlabReady(hold.device, "Fake H100", sms, f"/proc/{os.getpid()}/fd/{fd}".encode(), nbytes, 50_000_000_000, 1 << 20, 1_000_000))
    assert channel.receive() is None
    return 0


if __name__ == "__main__":
    sys.exit(main())
