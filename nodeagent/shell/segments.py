"""Predictor segments as the agent holds them: one memfd each, kept until no request and no lane refers to it.

Owns the descriptor and a count of references. Never maps the memory.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable

from contracts.errors import ProtocolError


class Segment:
    """A predictor's memory. `refs` counts its requests and the runs that may still write into it; `on_free` is called once nobody can."""

    __slots__ = ("_on_free", "_open", "fd", "id", "nbytes", "refs")

    def __init__(self, number: int, fd: int, nbytes: int, on_free: Callable[[Segment], None]) -> None:
        self.id = number
        self.fd = fd
        self.nbytes = nbytes
        self.refs = 0
        self._open = True
        self._on_free = on_free

    def release(self) -> None:
        """Drops one reference."""
        self.refs -= 1
        if not self.refs and not self._open:
            self._free()

    def close(self) -> None:
        """The predictor has gone: frees the segment now, or at its last release."""
        self._open = False
        if not self.refs:
            self._free()

    def _free(self) -> None:
        self._on_free(self)
        os.close(self.fd)


def check_segment(fd: int, nbytes: int) -> None:
    """ProtocolError unless `fd` is a memfd of at least `nbytes` that can never shrink: a lane that maps it must not be killed by SIGBUS."""
    size = os.fstat(fd).st_size
    if not 0 < nbytes <= size:
        raise ProtocolError(f"the segment holds {size} bytes, the Hello says {nbytes}")
    with contextlib.suppress(OSError):
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    try:
        sealed = fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
    except OSError:
        sealed = 0
    if not sealed:
        raise ProtocolError("the segment must be a memfd made with MFD_ALLOW_SEALING, so that it can be sealed against shrinking")
