"""A lane process and its answers: bit for bit those of the model run directly, wherever its weights lie and however they come."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from contracts.functions import FunctionClass
from contracts.lane_wire import BatchDone, BatchPaused, CopyGrant, CopyProgress, Resume, UnmapSegment
from contracts.units import MIB

if TYPE_CHECKING:
    from tests.predictor.worker.conftest import LaneEnd, Stored

    Spawner = Callable[..., LaneEnd]
    Store = Callable[[str], Stored]
    Inputs = Callable[[Stored, int, int], dict[str, np.ndarray]]

MODELS = {
    "a perceptron": "mlp?seed=1",
    "a convolutional network": "cnn?seed=2",
    "a transformer decoder": "gpt2?seed=3&n_layer=2&n_embd=64&n_head=4&vocab_size=1000",
    "speech, pretrained": "silero-vad",
}


def silent(end: LaneEnd) -> bool:
    """Nothing has come on the run channel."""
    return not select.select([end.runs], [], [], 0)[0]


@pytest.mark.parametrize("source", MODELS.values(), ids=MODELS)
def test_answers_equal_the_module_run_directly_wherever_its_weights_lie(lane: LaneEnd, stored: Store, inputs: Inputs, source: str) -> None:
    model = stored(source)
    memory = lane.map()
    lane.load("f", model, 256)
    for rows in (1, 3):
        arrays = inputs(model, rows, rows)
        batch = lane.batch("f", model, [arrays], memory, 256)
        done = lane.answer(batch)
        assert done.error is None
        assert done.gpu_ns > 0
        assert done.swap_ns == 0
        assert batch.gives(model.reference(arrays))


def test_a_lane_with_two_threads_answers_as_torch_with_two_threads(spawn: Spawner, stored: Store, inputs: Inputs) -> None:
    model = stored("mlp?features=2048&width=1024&depth=3")
    lane = spawn(threads=2)
    memory = lane.map()
    lane.load("f", model, 0)
    arrays = inputs(model, 64, 1)
    batch = lane.batch("f", model, [arrays], memory)
    assert lane.answer(batch).error is None
    torch.set_num_threads(2)
    try:
        assert batch.gives(model.reference(arrays))
    finally:
        torch.set_num_threads(1)


def test_minilm_fits_a_larger_slab_and_moves_to_a_new_place(spawn: Spawner, stored: Store, inputs: Inputs) -> None:
    model = stored("minilm")
    arrays = inputs(model, 2, 7)
    lane = spawn(slab_bytes=128 * MIB)
    memory = lane.map()
    lane.attach("f", model)
    for offset in (0, 4096):
        lane.until_copied(lane.begin_copy("f", offset, model.index.total_bytes), model.index.total_bytes)
        batch = lane.batch("f", model, [arrays], memory, offset)
        assert lane.answer(batch).error is None
        assert batch.gives(model.reference(arrays))


def test_two_functions_of_one_program_keep_their_own_weights(lane: LaneEnd, stored: Store, inputs: Inputs) -> None:
    first, second = stored("mlp?seed=1"), stored("mlp?seed=2")
    assert first.index.program_id == second.index.program_id
    memory = lane.map()
    lane.load("first", first, 0)
    lane.load("second", second, 16 * MIB)
    for turn in range(6):
        name, model, offset = (("first", first, 0), ("second", second, 16 * MIB))[turn % 2]
        arrays = inputs(model, 2, turn)
        batch = lane.batch(name, model, [arrays], memory, offset)
        assert lane.answer(batch).error is None
        assert batch.gives(model.reference(arrays))


def test_a_place_may_be_written_over_by_another_function_and_back(lane: LaneEnd, stored: Store, inputs: Inputs) -> None:
    models = {"mlp": stored("mlp?seed=1"), "cnn": stored("cnn?seed=1")}
    memory = lane.map()
    for name, model in models.items():
        lane.attach(name, model)
    for turn in range(4):
        name = ("mlp", "cnn")[turn % 2]
        model = models[name]
        lane.until_copied(lane.begin_copy(name, 0, model.index.total_bytes), model.index.total_bytes)
        arrays = inputs(model, 1, turn)
        batch = lane.batch(name, model, [arrays], memory, 0)
        assert lane.answer(batch).error is None
        assert batch.gives(model.reference(arrays))


def test_parts_run_as_one_batch_and_each_gets_its_rows(lane: LaneEnd, stored: Store, inputs: Inputs) -> None:
    model = stored("cnn?seed=2")
    memory = lane.map()
    lane.load("f", model, 0)
    parts = [inputs(model, rows, rows) for rows in (1, 3, 2)]
    batch = lane.batch("f", model, parts, memory)
    assert lane.answer(batch).error is None
    joined = model.reference({"image": np.concatenate([part["image"] for part in parts])})["scores"]
    for part, rows in enumerate((slice(0, 1), slice(1, 4), slice(4, 6))):
        assert batch.gives({"scores": joined[rows]}, part)


def test_a_run_goes_on_with_the_weights_as_they_are_granted_and_ends_with_the_last(lane: LaneEnd, stored: Store, inputs: Inputs) -> None:
    model = stored("mlp?seed=3")
    total = model.index.total_bytes
    memory = lane.map()
    lane.attach("f", model)
    arrays = inputs(model, 2, 1)
    expected = model.reference(arrays)
    stood_still_ns = 0
    for _ in range(10):
        lane.slab[:total] = os.urandom(total)
        copy = lane.begin_copy("f", 0, 1)
        batch = lane.batch("f", model, [arrays], memory, 0, copy=copy)
        lane.submit(batch)
        for step in range(1, 8):
            lane.until_copied(copy, max(1, (step - 1) * total // 8))
            assert silent(lane), "it ran without its weights"
            lane.copies.send(CopyGrant(copy, step * total // 8))
        lane.until_copied(copy, 7 * total // 8)
        lane.copies.send(CopyGrant(copy, total))
        done = lane.next_run()
        assert isinstance(done, BatchDone)
        assert done.error is None
        stood_still_ns += done.swap_ns
        assert batch.gives(expected)
        lane.until_copied(copy, total)
    assert stood_still_ns > 0


def test_a_run_may_overtake_its_attach_and_its_copy(lane: LaneEnd, stored: Store, inputs: Inputs) -> None:
    model = stored("mlp?seed=4")
    memory = lane.map()
    arrays = inputs(model, 1, 1)
    batch = lane.batch("f", model, [arrays], memory, 0, copy=1)
    lane.submit(batch)
    lane.send_attach("f", model)
    assert lane.begin_copy("f", 0, model.index.total_bytes) == 1
    done = lane.next_run()
    assert isinstance(done, BatchDone)
    assert done.error is None
    assert batch.gives(model.reference(arrays))


def test_a_preemptible_batch_pauses_at_a_gate_and_goes_on_when_it_is_told(lane: LaneEnd, stored: Store, inputs: Inputs) -> None:
    model = stored("mlp?seed=5")
    memory = lane.map()
    lane.load("f", model, 0)
    arrays = inputs(model, 2, 1)
    batch = lane.batch("f", model, [arrays], memory, preemptible=True)
    lane.page.pause_batch = batch.run.batch
    lane.submit(batch)
    for _ in range(3):
        paused = lane.next_run()
        assert isinstance(paused, BatchPaused)
        assert paused.batch == batch.run.batch
        other = lane.map(segment=2)
        lane.runs.send(UnmapSegment(2))
        other.close()
        assert silent(lane), "it went on by itself"
        lane.runs.send(Resume(batch.run.batch))
    lane.page.pause_batch = 0
    done = lane.next_run()
    while isinstance(done, BatchPaused):
        lane.runs.send(Resume(batch.run.batch))
        done = lane.next_run()
    assert isinstance(done, BatchDone)
    assert done.error is None
    assert done.gpu_ns > 0
    assert batch.gives(model.reference(arrays))


def test_a_batch_pauses_only_if_it_may_and_only_if_it_is_meant(lane: LaneEnd, stored: Store, inputs: Inputs) -> None:
    model = stored("mlp?seed=5")
    memory = lane.map()
    lane.load("f", model, 0)
    arrays = inputs(model, 1, 1)
    firm = lane.batch("f", model, [arrays], memory)
    lane.page.pause_batch = firm.run.batch
    assert lane.answer(firm).error is None
    other = lane.batch("f", model, [arrays], memory, preemptible=True)
    assert lane.answer(other).error is None
    lane.runs.send(Resume(other.run.batch))
    assert lane.answer(lane.batch("f", model, [arrays], memory)).error is None


def test_a_best_effort_lane_at_half_the_sms_is_charged_and_occupied_for_twice_the_time(spawn: Spawner, stored: Store, inputs: Inputs) -> None:
    model = stored("cnn?seed=1&size=128")
    lane = spawn(sm_percent=50, cls=FunctionClass.BEST_EFFORT)
    memory = lane.map()
    lane.load("f", model, 0)
    arrays = inputs(model, 4, 1)
    batch = lane.batch("f", model, [arrays], memory, preemptible=True)
    begun_ns = time.monotonic_ns()
    done = lane.answer(batch)
    assert done.gpu_ns <= time.monotonic_ns() - begun_ns
    assert done.gpu_ns % 2 == 0
    assert batch.gives(model.reference(arrays))


def test_progress_is_reported_often_enough_to_keep_two_chunks_in_flight(lane: LaneEnd, stored: Store) -> None:
    model = stored("mlp?features=4096&width=2048&depth=2")
    total = model.index.total_bytes
    lane.attach("f", model)
    copy = lane.begin_copy("f", 0, total)
    seen = []
    while not seen or seen[-1] < total:
        message = lane.next_copy()
        assert isinstance(message, CopyProgress)
        assert message.copy == copy
        seen.append(message.copied_bytes)
    assert seen == [*range(8 * MIB, total, 8 * MIB), total]
    assert lane.slab[:total] == model.path.read_bytes()
