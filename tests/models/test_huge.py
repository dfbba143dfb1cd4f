"""Weights in shared memory lie in huge pages where the kernel gives them, and are the same where it does not."""

from __future__ import annotations

import ctypes
import errno
import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from models import huge

SHARED = Path("/dev/shm")
POLICY = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
SIZES = {"less than a huge page": 12_345, "whole huge pages": 2 * huge.HUGE_BYTES, "some and a rest": 3 * huge.HUGE_BYTES + 12_345}


@pytest.fixture
def fd() -> Iterator[int]:
    """An empty file in shared memory."""
    if not SHARED.is_dir():
        pytest.skip(f"there is no {SHARED}")
    fd = os.open(SHARED, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC)
    yield fd
    os.close(fd)


def smaps(address: int) -> dict[str, str]:
    """What the kernel says of the mapping that begins there."""
    found: dict[str, str] = {}
    with open("/proc/self/smaps") as lines:
        for line in lines:
            if line.startswith(f"{address:x}-"):
                found["range"] = line
            elif found and line.split(maxsplit=1)[0].endswith(":"):
                name, value = line.split(":", 1)
                found[name] = value.strip()
            elif found:
                break
    return found


@pytest.mark.parametrize("nbytes", SIZES.values(), ids=SIZES)
def test_an_allocated_file_is_there_whole_and_holds_zeros(fd: int, nbytes: int) -> None:
    huge.allocate(fd, nbytes)
    status = os.fstat(fd)
    assert status.st_size == nbytes
    assert status.st_blocks * 512 >= nbytes
    assert bytes(huge.map_file(fd, nbytes)) == bytes(nbytes)


def test_what_fills_huge_pages_is_mapped_by_them(fd: int) -> None:
    release = tuple(int(part) for part in os.uname().release.split(".")[:2] if part.isdecimal())
    if release < (6, 1) or not POLICY.is_file() or "[deny]" in POLICY.read_text():
        pytest.skip("this kernel makes no huge pages of shared memory on demand")
    huge.allocate(fd, SIZES["some and a rest"])
    mapped = huge.map_file(fd, SIZES["some and a rest"])
    assert sum(mapped[:: huge.HUGE_BYTES // 2]) == 0
    assert smaps(ctypes.addressof(mapped))["ShmemPmdMapped"] == f"{3 * huge.HUGE_BYTES >> 10} kB"


def test_a_kernel_that_cannot_make_them_gives_small_pages(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huge, "_MADV_COLLAPSE", 12_345)
    huge.allocate(fd, SIZES["some and a rest"])
    mapped = huge.map_file(fd, SIZES["some and a rest"], writable=True)
    mapped[5] = 7
    assert os.pread(fd, 6, 0) == bytes([0, 0, 0, 0, 0, 7])
    assert os.fstat(fd).st_blocks * 512 >= SIZES["some and a rest"]


def test_a_mapping_lasts_as_long_as_what_refers_to_it(fd: int) -> None:
    huge.allocate(fd, SIZES["some and a rest"])
    mapped = huge.map_file(fd, SIZES["some and a rest"])
    view, address = memoryview(mapped), ctypes.addressof(mapped)
    assert address % huge.HUGE_BYTES == 0
    del mapped
    gc.collect()
    assert "r--s" in smaps(address)["range"]
    view.release()
    del view
    gc.collect()
    assert not smaps(address)


def test_what_cannot_be_mapped_is_an_error(tmp_path: Path) -> None:
    with open(tmp_path / "file", "wb") as file, pytest.raises(OSError, match=os.strerror(errno.EACCES)):
        huge.map_file(file.fileno(), 4096)
