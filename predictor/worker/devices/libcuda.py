"""The few calls for which torch has no name, or one that cannot be used, made to the driver library itself.

torch's own cudaHostRegister leaves a refusal behind as the runtime's last error, and the next kernel is then said to have failed: the driver keeps no
such note. Needs no device to be loaded; every call works on the context that is current, or is told one. Source: the CUDA driver API.
"""

from __future__ import annotations

import ctypes
from typing import Any

_LIBRARY = "libcuda.so.1"
READ_ONLY = 8
"""CU_MEMHOSTREGISTER_READ_ONLY: without it, memory that the CPU may only read cannot be registered."""
_AFFINITY_SM_COUNT = 0


class _Affinity(ctypes.Structure):
    """CUexecAffinityParam; longer than it is today, since it ends in a union."""

    _fields_ = (("kind", ctypes.c_int), ("sm_count", ctypes.c_uint), ("room", ctypes.c_uint * 14))


class LibCuda:
    """The driver, in the context that is current when this is made. Calls return the driver's error code, 0 for success."""

    def __init__(self, library: Any = None) -> None:
        self._cuda: Any = ctypes.CDLL(_LIBRARY) if library is None else library
        self._context = ctypes.c_void_p()
        self._cuda.cuCtxGetCurrent(ctypes.byref(self._context))

    def affinity_sms(self) -> int:
        """The SMs that the context is limited to; 0 where the driver knows no such limit."""
        found = _Affinity()
        self._enter()
        if not hasattr(self._cuda, "cuCtxGetExecAffinity") or self._cuda.cuCtxGetExecAffinity(ctypes.byref(found), _AFFINITY_SM_COUNT):
            return 0
        return int(found.sm_count)

    def register(self, address: int, nbytes: int, flags: int) -> int:
        """Pins `nbytes` of host memory for the context, from any thread."""
        self._enter()
        return int(self._cuda.cuMemHostRegister_v2(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), ctypes.c_uint(flags)))

    def unregister(self, address: int) -> int:
        """Undoes `register`, from any thread."""
        self._enter()
        return int(self._cuda.cuMemHostUnregister(ctypes.c_void_p(address)))

    def _enter(self) -> None:
        """A thread that has never asked torch for anything has no context."""
        self._cuda.cuCtxSetCurrent(self._context)
