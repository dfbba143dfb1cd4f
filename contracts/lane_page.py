"""The page of shared memory between the agent and one lane: where the agent asks a running batch to pause, without a message that nobody reads yet.

Word 0 holds the id of the batch that should pause at its next gate, 0 for none. One writer (the agent), one reader (the lane); an aligned 8-byte
store is atomic on the machines that we run on.
"""

from __future__ import annotations

import mmap
import os

PAGE_BYTES = 4096


class LanePage:
    """A mapping of the page behind `fd` (which stays the caller's)."""

    def __init__(self, fd: int) -> None:
        self._map = mmap.mmap(fd, PAGE_BYTES)
        self._words = memoryview(self._map).cast("Q")

    @staticmethod
    def create() -> int:
        """A descriptor of a new page, all zero."""
        fd = os.memfd_create("sluice-lane", os.MFD_CLOEXEC)
        os.ftruncate(fd, PAGE_BYTES)
        return fd

    @property
    def pause_batch(self) -> int:
        """The batch that should pause, 0 for none."""
        return self._words[0]

    @pause_batch.setter
    def pause_batch(self, batch: int) -> None:
        self._words[0] = batch

    def close(self) -> None:
        """Unmaps the page."""
        self._words.release()
        self._map.close()
