"""The life of a lane process: how it ends, with whom, and what it leaves behind."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import pytest

from contracts.lane_wire import BatchDone, BatchPaused, Copy, CopyGrant, Detach, Resume, UnmapSegment
from contracts.units import MIB

if TYPE_CHECKING:
    from tests.predictor.worker.conftest import ForkServer, LaneEnd, Stored

    Spawner = Callable[..., LaneEnd]
    Store = Callable[[str], Stored]
    Inputs = Callable[[Stored, int, int], dict[str, np.ndarray]]


def held(pid: int) -> tuple[int, int]:
    """(open descriptors, mappings) of a process."""
    with open(f"/proc/{pid}/maps") as maps:
        return len(os.listdir(f"/proc/{pid}/fd")), sum("memfd" in line or ".weights" in line for line in maps)


def test_sigterm_ends_an_idle_lane(lane: LaneEnd) -> None:
    os.kill(lane.pid, signal.SIGTERM)
    assert lane.runs.receive() is None
    assert lane.gone()


def test_sigterm_lets_the_batch_in_hand_finish(lane: LaneEnd, stored: Store, inputs: Inputs) -> None:
    model = stored("mlp?seed=1")
    memory = lane.map()
    lane.load("f", model, 0)
    arrays = inputs(model, 1, 1)
    batch = lane.batch("f", model, [arrays], memory, preemptible=True)
    lane.page.pause_batch = batch.run.batch
    lane.submit(batch)
    assert isinstance(lane.next_run(), BatchPaused)
    os.kill(lane.pid, signal.SIGTERM)
    lane.page.pause_batch = 0
    lane.runs.send(Resume(batch.run.batch))
    done = lane.next_run()
    assert isinstance(done, BatchDone)
    assert done.error is None
    assert batch.gives(model.reference(arrays))
    assert lane.runs.receive() is None
    assert lane.gone()


def test_a_killed_lane_shows_as_the_end_of_both_channels(lane: LaneEnd) -> None:
    os.kill(lane.pid, signal.SIGKILL)
    assert lane.gone()
    assert lane.runs.receive() is None
    assert lane.copies.receive() is None


@pytest.mark.parametrize("at", ["while it is idle", "while a run waits for weights", "while a batch is paused"])
def test_a_lane_does_not_outlive_its_agent(lane: LaneEnd, stored: Store, inputs: Inputs, at: str) -> None:
    model = stored("mlp?seed=1")
    memory = lane.map()
    lane.attach("f", model)
    copy = lane.begin_copy("f", 0, 4096)
    lane.until_copied(copy, 4096)
    if at == "while a run waits for weights":
        lane.submit(lane.batch("f", model, [inputs(model, 1, 1)], memory, copy=copy))
    if at == "while a batch is paused":
        lane.copies.send(CopyGrant(copy, model.index.total_bytes))
        batch = lane.batch("f", model, [inputs(model, 1, 1)], memory, copy=copy, preemptible=True)
        lane.page.pause_batch = batch.run.batch
        lane.submit(batch)
        assert isinstance(lane.next_run(), BatchPaused)
    lane.runs.close()
    lane.copies.close()
    assert lane.gone()


def test_a_copy_outside_the_slab_or_a_second_run_ends_the_lane(spawn: Spawner, stored: Store, inputs: Inputs) -> None:
    model = stored("mlp?seed=1")
    astray = spawn()
    astray.attach("f", model)
    astray.copies.send(Copy(1, "f", 63 * MIB, 1))
    assert astray.gone()
    strange = spawn()
    strange.copies.send(Copy(1, "f", 0, 1))
    assert strange.gone()
    doubled = spawn()
    memory = doubled.map()
    doubled.load("f", model, 0)
    batch = doubled.batch("f", model, [inputs(model, 1, 1)], memory, preemptible=True)
    doubled.page.pause_batch = batch.run.batch
    doubled.submit(batch)
    assert isinstance(doubled.next_run(), BatchPaused)
    doubled.submit(batch)
    assert doubled.gone()


def test_lanes_live_on_without_their_fork_server(server_of_its_own: ForkServer, stored: Store, inputs: Inputs) -> None:
    model = stored("mlp?seed=1")
    lane = server_of_its_own.spawn()
    memory = lane.map()
    lane.load("f", model, 0)
    server_of_its_own.process.kill()
    server_of_its_own.process.wait()
    batch = lane.batch("f", model, [inputs(model, 1, 1)], memory)
    assert lane.answer(batch).error is None


def test_a_thousand_segments_and_functions_leave_nothing_behind(lane: LaneEnd, stored: Store, inputs: Inputs) -> None:
    model = stored("mlp?seed=1&width=64&depth=1")
    memory = lane.map()
    arrays = inputs(model, 1, 1)

    def settles(open_files: int, mappings: int) -> bool:
        deadline = time.monotonic() + 30
        while held(lane.pid) != (open_files, mappings):
            if time.monotonic() > deadline:
                return False
        return True

    lane.load("kept", model, 0)
    assert lane.answer(lane.batch("kept", model, [arrays], memory)).error is None
    open_files, mappings = held(lane.pid)
    assert mappings == len(("slab", "lane page", "segment", "weights"))
    for cycle in range(1000):
        other = lane.map(segment=2, nbytes=MIB)
        lane.attach("f", model)
        copy = lane.begin_copy("f", MIB, model.index.total_bytes)
        lane.until_copied(copy, model.index.total_bytes)
        if cycle % 100 == 0:
            batch = lane.batch("f", model, [arrays], other, MIB, segment=2)
            assert lane.answer(batch).error is None
            assert batch.gives(model.reference(arrays))
        lane.copies.send(Detach("f"))
        lane.runs.send(UnmapSegment(2))
        other.close()
    assert settles(open_files, mappings), held(lane.pid)
    lane.copies.send(Detach("kept"))
    assert settles(open_files, mappings - 1), held(lane.pid)  # the file of weights was closed when they were mapped
