"""Predictor segments as the agent holds them: one memfd each, kept until no request and no lane refers to it.

Owns the descriptor and a count of references. Never maps the memory.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable

from contracts.errors import ProtocolError

_F_SEAL_FUTURE_WRITE = 0x10
_NEEDED_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
_FORBIDDEN_SEALS = fcntl.F_SEAL_WRITE | _F_SEAL_FUTURE_WRITE


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
    """ProtocolError unless `fd` is a writable memfd of at least `nbytes` that stays so: a lane that maps it must meet no SIGBUS and no refusal."""
    size = os.fstat(fd).st_size
    if not 0 < nbytes <= size:
        raise ProtocolError(f"the segment holds {size} bytes, the Hello says {nbytes}")
    if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDWR:
        raise ProtocolError("the segment must be open for reading and writing")
    with contextlib.suppress(OSError):
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _NEEDED_SEALS)
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        seals = 0
    if seals & _NEEDED_SEALS != _NEEDED_SEALS or seals & _FORBIDDEN_SEALS:
        raise ProtocolError(
            "the segment must be a memfd made with MFD_ALLOW_SEALING, which can be sealed against shrinking and is not against writing"
        )
