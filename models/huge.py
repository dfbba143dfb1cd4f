"""Huge pages for files in shared memory: weights that every lane maps, and a GPU's lane pins, in pages of 2 MiB instead of 512 times as many.

Owns the asking, which needs no rights and no mount option: the kernel makes them of a mapping on demand (MADV_COLLAPSE, Linux 6.1). Where it does
not, the file has small pages and is as right.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref

from contracts.units import MIB

HUGE_BYTES = 2 * MIB
_MADV_COLLAPSE = 25
_MAP_FIXED = 0x10
_MAP_FAILED = ctypes.c_void_p(-1).value
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def allocate(fd: int, nbytes: int) -> None:
    """Gives an empty file `nbytes` of zeros that are there, in huge pages where that can be; OSError when there is no room.

    One byte is written where each huge page is to be: it costs less to make one of a hole than of 512 pages, and it lies on this thread's NUMA node.
    """
    whole = nbytes // HUGE_BYTES * HUGE_BYTES
    if whole:
        os.ftruncate(fd, whole)
        for offset in range(0, whole, HUGE_BYTES):
            os.pwrite(fd, b"\0", offset)
        mapped = map_file(fd, whole)
        _libc.madvise(ctypes.addressof(mapped), whole, _MADV_COLLAPSE)
    os.posix_fallocate(fd, 0, nbytes)


def map_file(fd: int, nbytes: int, *, writable: bool = False) -> ctypes.Array[ctypes.c_ubyte]:
    """The first `nbytes` of a file, mapped for as long as the result lives, at an address that fits huge pages: mmap does not choose one by itself.

    OSError as mmap gives it. Whoever writes to what is not `writable` ends the process.
    """
    size = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    room = _map(None, size + HUGE_BYTES, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1)
    address = -(-room // HUGE_BYTES) * HUGE_BYTES
    try:
        _map(address, size, mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0), mmap.MAP_SHARED | _MAP_FIXED, fd)
    except OSError:
        _libc.munmap(room, size + HUGE_BYTES)
        raise
    if address > room:
        _libc.munmap(room, address - room)
    _libc.munmap(address + size, room + HUGE_BYTES - address)
    content = (ctypes.c_ubyte * nbytes).from_address(address)
    weakref.finalize(content, _libc.munmap, address, size).atexit = False
    return content


def _map(address: int | None, size: int, protection: int, flags: int, fd: int) -> int:
    mapped = _libc.mmap(address, size, protection, flags, fd, 0)
    if mapped == _MAP_FAILED:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return int(mapped)
