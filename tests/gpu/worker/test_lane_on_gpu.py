"""Lanes on a real GPU: answers bit for bit those of the unswapped model, whatever the weights' way; caps as they are; one lane's end is its own."""

from __future__ import annotations

import importlib.util
import os
import select
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import pytest
import torch

from contracts.functions import FunctionClass
from contracts.lane_wire import BatchDone, BatchPaused, Copy, CopyGrant, Detach, MapPeer, PeerMapped, Resume, SlabReady
from contracts.units import MIB
from tests.gpu.worker.conftest import SEAL

if TYPE_CHECKING:
    from tests.predictor.worker.conftest import LaneEnd, Stored

    Start = Callable[..., LaneEnd]
    Store = Callable[[str], Stored]
    Inputs = Callable[[Stored, int, int], dict[str, np.ndarray]]

pytestmark = pytest.mark.gpu
MODELS = ("mlp?seed=1", "cnn?seed=2", "resnet50?seed=3", "bert-base?seed=4", "gpt2?seed=5")


def let_idle(lane: LaneEnd, seconds: float) -> None:
    """An idle moment, in which the lane may record a graph and must say nothing."""
    assert not select.select([lane.runs], [], [], seconds)[0]


@pytest.mark.parametrize("source", MODELS)
def test_cold_warm_and_recorded_answers_are_those_of_the_unswapped_model(start: Start, stored: Store, inputs: Inputs, source: str) -> None:
    model = stored(source)
    total = model.index.total_bytes
    lane = start()
    memory = lane.map()
    lane.attach("f", model)
    arrays = inputs(model, 2, 1)
    expected = model.reference(arrays)
    for offset in (0, 512 * MIB, 0):
        copy = lane.begin_copy("f", offset, min(total, MIB))
        cold = lane.batch("f", model, [arrays], memory, offset, copy=copy)
        lane.submit(cold)
        for until in range(8 * MIB, total + 8 * MIB, 8 * MIB):
            lane.copies.send(CopyGrant(copy, min(until, total)))
        done = lane.next_run()
        assert isinstance(done, BatchDone)
        assert done.error is None
        assert cold.gives(expected)
        lane.until_copied(copy, total)
        for turn in range(5):
            warm = lane.batch("f", model, [arrays], memory, offset)
            done = lane.answer(warm)
            assert done.error is None
            assert done.gpu_ns > 0
            assert done.swap_ns == 0
            assert warm.gives(expected)
            if turn == 1:
                # The second run at one place: now the graph is recorded that the others replay.
                let_idle(lane, 0.5)


def test_weights_come_from_a_slab_by_its_handle_once_its_seal_was_read(start: Start, slab: SlabReady, stored: Store, inputs: Inputs) -> None:
    """One GPU stands for two here: the way is that of a peer's slab, but for the link."""
    model = stored("resnet50?seed=3")
    total = model.index.total_bytes
    holder, reader = start(), start()
    holder.load("f", model, 0)
    memory = reader.map()
    reader.attach("f", model)
    peer = MapPeer("cuda:1", slab.nbytes, 0, slab.handle, SEAL)
    with open(os.devnull, "rb") as null:
        reader.copies.send(msgspec.structs.replace(peer, seal=SEAL + 1), [null.fileno()])
        refused = reader.next_copy()
        reader.copies.send(peer, [null.fileno()])
        mapped = reader.next_copy()
    assert isinstance(refused, PeerMapped)
    assert "cannot be trusted" in refused.error
    assert isinstance(mapped, PeerMapped)
    assert mapped.error == ""
    assert mapped.bytes_per_s > 0
    arrays = inputs(model, 2, 1)
    reader.copies.send(Copy(1, "f", 512 * MIB, total, "cuda:1", 0))
    batch = reader.batch("f", model, [arrays], memory, 512 * MIB, copy=1)
    assert reader.answer(batch).error is None
    assert batch.gives(model.reference(arrays))


def test_two_lanes_share_one_slab(start: Start, stored: Store, inputs: Inputs) -> None:
    model = stored("resnet50?seed=3")
    first, second = start(), start(cls=FunctionClass.BEST_EFFORT)
    first.load("f", model, 0)
    second.attach("f", model)
    arrays = inputs(model, 1, 1)
    batch = second.batch("f", model, [arrays], second.map())
    assert second.answer(batch).error is None
    assert batch.gives(model.reference(arrays))


def test_a_preemptible_batch_pauses_and_its_answer_is_right(start: Start, stored: Store, inputs: Inputs) -> None:
    model = stored("bert-base?seed=4")
    lane = start(cls=FunctionClass.BEST_EFFORT)
    lane.load("f", model, 0)
    arrays = inputs(model, 4, 1)
    batch = lane.batch("f", model, [arrays], lane.map(), preemptible=True)
    lane.page.pause_batch = batch.run.batch
    lane.submit(batch)
    pauses = 0
    while isinstance(message := lane.next_run(), BatchPaused):
        pauses += 1
        lane.runs.send(Resume(batch.run.batch))
    assert isinstance(message, BatchDone)
    assert message.error is None
    assert pauses > 10
    assert batch.gives(model.reference(arrays))


def test_a_lane_reads_back_and_measures_the_whole_gpu(start: Start, slab: SlabReady) -> None:
    ready = start().ready
    assert ready is not None
    assert ready.sms == slab.sms
    assert 80 < ready.measured_sm_percent < 110


@pytest.mark.skipif(not importlib.util.find_spec("cuda.bindings") if importlib.util.find_spec("cuda") else True, reason="needs cuda-bindings")
@pytest.mark.parametrize("tenths", [2, 5, 8])
def test_a_green_lane_has_the_sms_that_it_was_given_and_answers_right(
    start: Start, slab: SlabReady, stored: Store, inputs: Inputs, tenths: int
) -> None:
    sms = slab.sms * tenths // 10 // 8 * 8
    lane = start(backend="green", lane_sms=sms, sm_percent=10 * tenths)
    assert lane.ready is not None
    assert lane.ready.sms == sms
    share = 100 * sms / slab.sms
    assert 0.9 * share < lane.ready.measured_sm_percent < 1.1 * share + 1
    model = stored("mlp?seed=1")
    lane.load("f", model, 0)
    memory = lane.map()
    arrays = inputs(model, 2, 1)
    outputs = []
    for _ in range(5):
        batch = lane.batch("f", model, [arrays], memory)
        assert lane.answer(batch).error is None
        outputs.append({name: array.tobytes() for name, array in batch.outputs().items()})
        let_idle(lane, 0.2)
    assert outputs == outputs[:1] * 5


def test_too_large_a_batch_fails_alone(start: Start, stored: Store, inputs: Inputs) -> None:
    model = stored("mlp?features=16&width=8192&depth=2")
    lane = start(activation_bytes=256 * MIB)
    lane.load("f", model, 0)
    memory = lane.map()
    error = lane.answer(lane.batch("f", model, [inputs(model, 20000, 1)], memory)).error
    assert error is not None
    assert "out of memory" in error[1]
    arrays = inputs(model, 4, 1)
    batch = lane.batch("f", model, [arrays], memory)
    assert lane.answer(batch).error is None
    assert batch.gives(model.reference(arrays))


def test_functions_come_and_go_and_leave_no_device_memory(start: Start, stored: Store, inputs: Inputs) -> None:
    model = stored("resnet50?seed=3")
    lane = start()
    memory = lane.map()
    arrays = inputs(model, 1, 1)
    expected = model.reference(arrays)
    free = []
    for turn in range(12):
        lane.load(f"f{turn}", model, 0)
        for _ in range(3):
            batch = lane.batch(f"f{turn}", model, [arrays], memory)
            assert lane.answer(batch).error is None
            assert batch.gives(expected)
            let_idle(lane, 0.2)
        lane.copies.send(Detach(f"f{turn}"))
        free.append(torch.cuda.mem_get_info()[0])
    assert free[-1] >= free[3] - 64 * MIB
