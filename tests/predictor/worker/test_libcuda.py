"""The driver's own calls, against a library that keeps a context for each thread, as the driver does."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import Any

from predictor.worker.devices.libcuda import READ_ONLY, LibCuda

CONTEXT = 0x7F0000001000
NOT_SUPPORTED, INVALID_CONTEXT, UNSUPPORTED_AFFINITY = 801, 201, 224


class Library:
    """As libcuda.so.1: a thread has no context until it is given one, and without one every call is refused."""

    def __init__(self, sms: int = 0, refused: int = 0) -> None:
        self.sms, self.refused = sms, refused
        self.registered: dict[int, tuple[int, int]] = {}
        self.local = threading.local()
        self.local.context = CONTEXT

    def cuCtxGetCurrent(self, found: Any) -> int:
        found._obj.value = getattr(self.local, "context", None)
        return 0

    def cuCtxSetCurrent(self, context: ctypes.c_void_p) -> int:
        self.local.context = context.value
        return 0

    def cuCtxGetExecAffinity(self, found: Any, kind: int) -> int:
        if getattr(self.local, "context", None) != CONTEXT:
            return INVALID_CONTEXT
        if not self.sms or kind:
            return UNSUPPORTED_AFFINITY
        found._obj.sm_count = self.sms
        return 0

    def cuMemHostRegister_v2(self, address: ctypes.c_void_p, nbytes: ctypes.c_size_t, flags: ctypes.c_uint) -> int:
        if getattr(self.local, "context", None) != CONTEXT:
            return INVALID_CONTEXT
        if not self.refused:
            self.registered[address.value or 0] = nbytes.value, flags.value
        return self.refused

    def cuMemHostUnregister(self, address: ctypes.c_void_p) -> int:
        if getattr(self.local, "context", None) != CONTEXT:
            return INVALID_CONTEXT
        del self.registered[address.value or 0]
        return 0


def in_a_thread(call: Callable[[], int]) -> int:
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(call()))
    thread.start()
    thread.join()
    return found[0]


def test_memory_is_pinned_from_a_thread_that_has_no_context_and_beyond_4_gib() -> None:
    library = Library()
    cuda = LibCuda(library)
    assert in_a_thread(lambda: cuda.register(0x7FFF00000000, 6 << 30, READ_ONLY)) == 0
    assert library.registered == {0x7FFF00000000: (6 << 30, 8)}
    assert in_a_thread(lambda: cuda.unregister(0x7FFF00000000)) == 0
    assert library.registered == {}


def test_a_refusal_is_the_drivers_code() -> None:
    assert LibCuda(Library(refused=NOT_SUPPORTED)).register(4096, 4096, READ_ONLY) == NOT_SUPPORTED


def test_the_sms_of_a_limited_context_are_read_back_and_none_are_made_up() -> None:
    assert LibCuda(Library(sms=66)).affinity_sms() == 66
    assert LibCuda(Library()).affinity_sms() == 0
