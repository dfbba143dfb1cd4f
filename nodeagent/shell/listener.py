"""A listening Unix socket in the run dir, and who is at the other end of a connection.

Owns the socket file: takes over one that a killed agent left, and unlinks its own. Never reads a message.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import socket
import struct
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from contracts.errors import Unavailable

_log = logging.getLogger(__name__)
_UCRED = struct.Struct("3i")
_ACCEPT_PAUSE_S = 0.1
_HEIR_S = 10.0
_HEIR_POLL_S = 0.01


class Credentials(msgspec.Struct, frozen=True):
    """SO_PEERCRED: the process that connected."""

    pid: int
    uid: int


def credentials(sock: socket.socket) -> Credentials:
    """Who is at the other end, as the kernel knows it."""
    pid, uid, _ = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return Credentials(pid, uid)


def lock_run_dir(run_dir: Path) -> int:
    """Makes the run dir (mode 0700) and takes its lock; Unavailable if another agent lives there. Returns the lock's descriptor.

    The lock of an agent that was killed can outlive it for a moment, in a child that has not yet run its own program: that is waited for.
    """
    run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    run_dir.chmod(0o700)
    fd = os.open(run_dir / "agent.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    give_up_at = time.monotonic() + _HEIR_S
    while not _lock(fd):
        owner = os.pread(fd, 32, 0).decode(errors="replace").strip() or "unknown"
        if Path(f"/proc/{owner}").exists() or time.monotonic() > give_up_at:
            os.close(fd)
            raise Unavailable(f"{run_dir} is served by another agent (pid {owner}): stop it, or use another --run-dir")
        time.sleep(_HEIR_POLL_S)
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    return fd


def _lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


class Listener:
    """Accepts connections on `path` and hands each socket to `on_connect`. The caller holds the run dir's lock."""

    def __init__(self, path: Path, on_connect: Callable[[socket.socket], None]) -> None:
        self._path = path
        self._on_connect = on_connect
        self._loop = asyncio.get_running_loop()
        path.unlink(missing_ok=True)
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        self._sock.bind(str(path))
        self._sock.listen(256)
        self._open = True
        self._listen()

    def close(self) -> None:
        """Accepts no more and removes the socket file."""
        if self._open:
            self._open = False
            self._loop.remove_reader(self._sock.fileno())
            self._sock.close()
            self._path.unlink(missing_ok=True)

    def _listen(self) -> None:
        if self._open:
            self._loop.add_reader(self._sock.fileno(), self._accept)

    def _accept(self) -> None:
        try:
            sock, _ = self._sock.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return
        except OSError as error:
            _log.warning("cannot accept on %s: %s", self._path.name, error)
            self._loop.remove_reader(self._sock.fileno())
            self._loop.call_later(_ACCEPT_PAUSE_S, self._listen)
            return
        self._on_connect(sock)
