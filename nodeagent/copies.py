"""Copies over one link, granted chunk by chunk by a completely fair scheduler. Pure; it grants, the lanes copy.

vruntime grows by bytes / weight (Missile, PPoPP'25), so links are shared by weight and never left idle; a copy that is behind the rate its deadline
needs, size / (deadline - run time) (FaaSTube), goes first. Few chunks are in flight, so that a new urgent copy waits for at most those.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nodeagent.memory import Extent


class CopyTask:
    """One copy: `granted_bytes` may go, `copied_bytes` have arrived. `due_ns` is when all should be there.

    `moved_ns` is when it last went on, or was given something to do. `source` are the weights on another device that it reads, None for the host's.
    `spoilt`: they were lost meanwhile, and what arrives is of no use.
    """

    __slots__ = (
        "copied_bytes",
        "copy",
        "device",
        "due_ns",
        "granted_bytes",
        "lane",
        "link",
        "moved_ns",
        "nbytes",
        "owner",
        "source",
        "spoilt",
        "started_ns",
        "vruntime",
        "weight",
    )

    link: Link

    def __init__(
        self, copy: int, device: str, lane: int, owner: int, nbytes: int, weight: int, started_ns: int, due_ns: int, source: Extent | None = None
    ) -> None:
        self.source = source
        self.spoilt = False
        self.copy = copy
        self.device = device
        self.lane = lane
        self.owner = owner
        self.nbytes = nbytes
        self.weight = weight
        self.started_ns = self.moved_ns = started_ns
        self.due_ns = due_ns
        self.granted_bytes = 0
        self.copied_bytes = 0
        self.vruntime = 0

    def behind_bytes(self, now_ns: int) -> int:
        """How many bytes fewer than its deadline needs have been granted by now; 0 when on schedule, or when the deadline is lost anyway."""
        if not self.started_ns < now_ns < self.due_ns:
            return 0
        needed = self.nbytes * (now_ns - self.started_ns) // (self.due_ns - self.started_ns)
        return max(0, needed - self.granted_bytes)


class Link:
    """The copies that share one link: from the host, or from one device to another, granted in chunks of `chunk_bytes`."""

    def __init__(self, chunk_bytes: int, chunks_in_flight: int, bytes_per_s: int) -> None:
        self.tasks: dict[int, CopyTask] = {}
        self.bytes_per_s = bytes_per_s
        self.waiting_bytes = 0
        """Bytes that copies under way still have to move."""
        self.chunk_bytes = chunk_bytes
        self._window_bytes = chunk_bytes * chunks_in_flight
        self.in_flight_bytes = 0
        self._vruntime = 0

    def begin(self, task: CopyTask) -> None:
        """A new copy; it starts level with the least served of the others, so that it neither waits for their past nor pays for it."""
        task.vruntime = self._vruntime
        task.link = self
        self.tasks[task.copy] = task
        self.waiting_bytes += task.nbytes

    def progress(self, copy: int, copied_bytes: int, now_ns: int) -> CopyTask | None:
        """Bytes have arrived; returns the task, or None if the copy is unknown (its lane was lost)."""
        task = self.tasks.get(copy)
        if task is None:
            return None
        copied_bytes = min(max(copied_bytes, task.copied_bytes), task.granted_bytes)
        arrived_bytes = copied_bytes - task.copied_bytes
        self.in_flight_bytes -= arrived_bytes
        self.waiting_bytes -= arrived_bytes
        task.copied_bytes = copied_bytes
        if arrived_bytes:
            task.moved_ns = now_ns
        if copied_bytes == task.nbytes:
            del self.tasks[copy]
        return task

    def abandon(self, copy: int) -> None:
        """A copy ends unfinished (its lane was lost)."""
        task = self.tasks.pop(copy)
        self.in_flight_bytes -= task.granted_bytes - task.copied_bytes
        self.waiting_bytes -= task.nbytes - task.copied_bytes

    def grant(self, now_ns: int) -> list[CopyTask]:
        """Grants chunks while the link has room; returns each task that was granted more, once."""
        granted: dict[int, CopyTask] = {}
        open_tasks = [task for task in self.tasks.values() if task.granted_bytes < task.nbytes]
        while open_tasks and self.in_flight_bytes < self._window_bytes:
            task = open_tasks[0] if len(open_tasks) == 1 else min(open_tasks, key=lambda t: (-t.behind_bytes(now_ns), t.vruntime, t.copy))
            left = task.nbytes - task.granted_bytes
            chunk = left if left < self.chunk_bytes else self.chunk_bytes
            if self.in_flight_bytes + chunk > self._window_bytes:
                break
            self._vruntime = task.vruntime
            if task.granted_bytes == task.copied_bytes:
                task.moved_ns = now_ns
            task.granted_bytes += chunk
            task.vruntime += (chunk << 10) // task.weight
            self.in_flight_bytes += chunk
            granted[task.copy] = task
            if chunk == left:
                open_tasks.remove(task)
        return list(granted.values())

    def alone_ns(self, nbytes: int) -> int:
        """How long so many bytes take a copy that has the link for itself."""
        return nbytes * 1_000_000_000 // self.bytes_per_s

    def swap_ns(self, nbytes: int) -> int:
        """How long the weights would take now: behind half of what is under way, since the link is shared."""
        return self.alone_ns(nbytes + self.waiting_bytes // 2)

    def observe(self, nbytes: int, took_ns: int) -> None:
        """A copy that had the link for itself took this long: the expected speed follows."""
        if took_ns > 0 and nbytes >= 1 << 20:
            self.bytes_per_s = max(1, (self.bytes_per_s * 7 + nbytes * 1_000_000_000 // took_ns) // 8)
