"""What the processes of a fake GPU share: its facts, and the way in which a process becomes a client of the fake MPS daemon."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path

SMS = 132
TOTAL_BYTES = 64 << 20


def uuid(index: int) -> str:
    """Of the fake GPU of this number."""
    return f"GPU-00000000-0000-0000-0000-{index:012d}"


def join_mps() -> bool:
    """Makes this process a client of the daemon that its environment names, as CUDA's start does; False without one, and then there is no limit.

    A client whose server goes, or that is terminated, dies at its next use of the GPU: here at once.
    """
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.connect(str(Path(os.environ["CUDA_MPS_PIPE_DIRECTORY"]) / "server"))
        sock.sendall(f"client {os.getpid()}\n".encode())
        joined = sock.recv(64) == b"joined\n"
    except (KeyError, OSError):
        return False
    if not joined:
        os._exit(1)

    def die_with_the_server() -> None:
        sock.recv(1)
        os._exit(1)

    threading.Thread(target=die_with_the_server, daemon=True).start()
    return True


def sms() -> int:
    """The SMs that this process may use, as it would read them back from its context."""
    percent = int(os.environ.get("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", 100)) if join_mps() else 100
    return SMS if percent == 100 else max(2, SMS * percent // 100 // 2 * 2)
