"""Captures by torch: CUDA graphs that share one pool of memory, and what becomes of a capture that fails.

Owns the pool's handle and knows who still uses it. Which graphs there are, and for how long, is for `graphs.py` to say. Source: torch's
"Graph memory management", and its allocator, which marks a pool as dead when its last graph is reset and then refuses captures into it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TypeVar

import torch

_T = TypeVar("_T")


class _Pool:
    """A handle of torch's, and how many graphs hold memory there."""

    def __init__(self) -> None:
        self.handle = torch.cuda.graph_pool_handle()
        self.users = 0


class Captured:
    """As Graph. It is one of its pool's users until it is reset."""

    def __init__(self, graph: torch.cuda.CUDAGraph, pool: _Pool) -> None:
        self.replay = graph.replay
        self._graph = graph
        self._pool = pool
        pool.users += 1

    def reset(self) -> None:
        """As Graph.reset."""
        self._graph.reset()
        self._pool.users -= 1


class Captures:
    """All graphs of one process. None is replayed before the outputs of the one before were fetched: they lie in the same memory."""

    def __init__(self) -> None:
        self._pool = _Pool()
        self._broken: list[torch.cuda.CUDAGraph] = []

    def capture(self, run: Callable[[], _T]) -> tuple[Captured, _T]:
        """As Driver.capture, on the current stream."""
        if not self._pool.users:
            self._pool = _Pool()
        graph = torch.cuda.CUDAGraph()
        try:
            graph.capture_begin(pool=self._pool.handle, capture_error_mode="thread_local")
            # So that torch itself refuses to wait, before CUDA does: that would break the capture.
            torch.cuda.set_sync_debug_mode("error")
            result = run()
        except BaseException:
            with contextlib.suppress(RuntimeError):
                self._end(graph)
                graph.reset()
            raise
        finally:
            torch.cuda.set_sync_debug_mode("default")
        self._end(graph)
        return Captured(graph, self._pool), result

    def _end(self, graph: torch.cuda.CUDAGraph) -> None:
        """Of a capture that is broken the allocator never hears that it ended: it goes on asking the graph, and takes no other into the pool."""
        try:
            graph.capture_end()
        except RuntimeError:
            self._broken.append(graph)
            self._pool = _Pool()
            raise
