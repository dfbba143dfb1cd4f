"""Captures, on an allocator of graph pools with torch's rules: one whose last graph was reset is dead, and so is one whose capture is broken."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from predictor.worker.devices.captures import Captures


class Allocator:
    """What torch knows of pools, and the graphs that it was asked for."""

    def __init__(self) -> None:
        self.users: Counter[int] = Counter()
        self.recording: set[int] = set()
        self.handles = 0
        self.mode = "default"
        self.broken = False

    def handle(self) -> int:
        self.handles += 1
        return self.handles

    def set_mode(self, mode: str) -> None:
        self.mode = mode

    def graph(self) -> Graph:
        return Graph(self)


class Graph:
    """As torch.cuda.CUDAGraph."""

    def __init__(self, allocator: Allocator) -> None:
        self.allocator = allocator
        self.pool = 0

    def capture_begin(self, pool: int, capture_error_mode: str) -> None:
        if pool in self.allocator.users and not self.allocator.users[pool]:
            raise RuntimeError("it->second->use_count > 0 INTERNAL ASSERT FAILED")
        if pool in self.allocator.recording:
            raise RuntimeError("beginAllocateToPool: already recording to mempool_id")
        assert capture_error_mode == "thread_local"
        self.pool = pool
        self.allocator.users[pool] += 1
        self.allocator.recording.add(pool)

    def capture_end(self) -> None:
        if self.allocator.broken:
            raise RuntimeError("operation failed due to a previous error during capture")
        self.allocator.recording.remove(self.pool)

    def replay(self) -> None:
        pass

    def reset(self) -> None:
        self.allocator.users[self.pool] -= 1


@pytest.fixture
def allocator(monkeypatch: pytest.MonkeyPatch) -> Allocator:
    allocator = Allocator()
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", allocator.handle)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", allocator.graph)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", allocator.set_mode)
    return allocator


def fails() -> None:
    raise RuntimeError("called a synchronizing CUDA operation")


def test_graphs_share_a_pool_while_there_is_one(allocator: Allocator) -> None:
    captures = Captures()
    first, _ = captures.capture(lambda: None)
    captures.capture(lambda: None)
    first.reset()
    captures.capture(lambda: None)
    assert sorted(allocator.users.values()) == [2]


def test_after_the_last_graph_has_gone_there_is_a_new_pool(allocator: Allocator) -> None:
    captures = Captures()
    for _ in range(3):
        graph, found = captures.capture(lambda: allocator.mode)
        assert found == "error"
        assert allocator.mode == "default"
        graph.reset()
    assert not any(allocator.users.values())


@pytest.mark.parametrize("broken", [False, True], ids=["refused by torch", "broken by CUDA"])
def test_a_capture_that_fails_spoils_no_later_one(broken: bool, allocator: Allocator) -> None:
    captures = Captures()
    others = []
    for _ in range(2):
        others.append(captures.capture(lambda: None)[0])
        allocator.broken = broken
        with pytest.raises(RuntimeError, match="synchronizing"):
            captures.capture(fails)
        assert allocator.mode == "default"
        allocator.broken = False
        captures.capture(lambda: None)[0].reset()
    for other in others:
        other.reset()
    captures.capture(lambda: None)


def test_a_capture_whose_end_fails_spoils_no_later_one(allocator: Allocator) -> None:
    captures = Captures()
    allocator.broken = True
    with pytest.raises(RuntimeError, match="previous error"):
        captures.capture(lambda: None)
    allocator.broken = False
    captures.capture(lambda: None)[0].reset()
    captures.capture(lambda: None)
