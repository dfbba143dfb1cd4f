"""Half of the machine's cores for the reading of one model: the rest serves meanwhile.

Owns the threads. For work that lets go of the interpreter: random numbers, hashing, writing.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager

THREADS = max(1, len(os.sched_getaffinity(0)) // 2)


@contextmanager
def at_once() -> Iterator[Callable[..., None]]:
    """A function `start(call, *arguments)`; at the end all calls have ended, and the first error of one is raised."""
    started: list[Future[object]] = []

    def start(call: Callable[..., object], *arguments: object) -> None:
        started.append(_pool().submit(call, *arguments))

    try:
        yield start
    finally:
        wait(started)
    for future in started:
        future.result()


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(THREADS, "models")
