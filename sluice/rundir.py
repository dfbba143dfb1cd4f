"""The run directory: sockets of one node, used by one supervisor at a time, private to one user.

Owns the folder and its lock; removes it, and the node's weight store, at the end. A lock dies with its process, so nothing is ever stale.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
from pathlib import Path

from contracts.errors import SluiceError

_LOCK = "up.lock"
_SOCKET_PATH_BYTES = 107


class RunDir:
    """A held run directory."""

    def __init__(self, path: Path, store: Path) -> None:
        """Makes and locks it; SluiceError when it is another user's, another supervisor's, or too long for a socket's name."""
        self.path = path
        self._store = store
        if len(os.fsencode(path / "control.sock")) > _SOCKET_PATH_BYTES:
            raise SluiceError(f"the run directory {str(path)!r} is too long for a Unix socket: name a shorter one with --run-dir")
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = path.lstat()
        except OSError as error:
            raise SluiceError(f"cannot use the run directory {path}: {error.strerror or error}. Name another with --run-dir") from None
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
            raise SluiceError(f"the run directory {path} is not private to you (mode 0700, your own): name another with --run-dir")
        self._lock = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            owner = os.read(self._lock, 20).decode(errors="replace").strip()
            os.close(self._lock)
            raise SluiceError(f"a node runs at {path} already (process {owner}): stop it, or name another --run-dir") from None
        os.ftruncate(self._lock, 0)
        os.write(self._lock, str(os.getpid()).encode())

    def remove(self) -> None:
        """Removes the weight store and the directory, then lets go of the lock."""
        shutil.rmtree(self._store, ignore_errors=True)
        for entry in self.path.iterdir():
            with contextlib.suppress(OSError):
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        with contextlib.suppress(OSError):
            self.path.rmdir()
        os.close(self._lock)
