"""What lies where in the devices' memory, as a state's copies put it there: no copy may write over what is read, or read what is not there."""

from __future__ import annotations

from typing import NamedTuple

from nodeagent import events as ev


class Written(NamedTuple):
    """Weights that a copy brings, or has brought."""

    copy: int
    function: str
    device: str
    start: int
    end: int


class Slabs:
    """`reads` are the places that copies under way read: copy -> (lane, what lies there)."""

    def __init__(self) -> None:
        self.reads: dict[int, tuple[int, Written]] = {}
        self._written: list[Written] = []
        self._complete: set[int] = set()

    def begin(self, copy: ev.Copy, device: str, nbytes: int) -> None:
        """Some bytes of the target are written from now on; AssertionError when that may not be."""
        new = Written(copy.copy, copy.function, device, copy.offset, copy.offset + nbytes)
        for reader, (_, read) in self.reads.items():
            assert not _overlap(read, new), f"copy {copy.copy} writes over what copy {reader} reads"
        if copy.source:
            place = copy.source, copy.source_offset, copy.function
            found = [each for each in self._written if (each.device, each.start, each.function) == place and each.copy in self._complete]
            assert found and device != copy.source, f"copy {copy.copy} reads what is not there"
            self.reads[copy.copy] = copy.lane, found[0]
        self._written = [each for each in self._written if not _overlap(each, new)] + [new]

    def complete(self, copy: int) -> None:
        """All of it has arrived."""
        self._complete.add(copy)
        self.reads.pop(copy, None)

    def abandon(self, copy: int) -> None:
        """Who made the copy has gone."""
        self.reads.pop(copy, None)

    def forget(self, device: str) -> None:
        """A device has lost its memory."""
        self._written = [each for each in self._written if each.device != device]

    def renew(self, device: str) -> None:
        """It has other memory: who still reads the old is no more in the way."""
        self.reads = {copy: (lane, read) for copy, (lane, read) in self.reads.items() if read.device != device}


def _overlap(one: Written, other: Written) -> bool:
    return one.device == other.device and one.start < other.end and other.start < one.end
