from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import pytest
import torch

from contracts.functions import FunctionClass
from contracts.units import MIB
from contracts.wire import Attach, Attached, BatchDone, BatchPaused, Copy, CopyGrant, CopyProgress, Detach, Resume, Run, UnmapSegment

if TYPE_CHECKING:
    from tests.predictor.worker.conftest import Batch, ForkServer, LaneEnd, Stored

    Spawner = Callable[..., LaneEnd]
    Store = Callable[[str], Stored]
    Inputs = Callable[[Stored, int, int], dict[str, np.ndarray]]

MODELS = {
    "a perceptron": "mlp?seed=1",
    "a convolutional network": "cnn?seed=2",
    "a transformer decoder": "gpt2?seed=3&n_layer=2&n_embd=64&n_head=4&vocab_size=1000",
    "speech, pretrained": "silero-vad",
}


def same(batch: Batch, expected: dict[str, np.ndarray], part: int = 0) -> bool:
    """Bit for bit."""
    found = batch.outputs(part)
    return found.keys() == expected.keys() and all(found[name].tobytes() == expected[name].tobytes() for name in expected)


def silent(end: LaneEnd) -> bool:
    """Nothing has come on the run channel."""
    return not select.select([end.runs], [], [], 0)[0]


def held(pid: int) -> tuple[int, int]:
    """(open descriptors, mappings) of a process."""
    with open(f"/proc/{pid}/maps") as maps:
        return len(os.listdir(f"/proc/{pid}/fd")), sum("memfd" in line or ".weights" in line for line in maps)


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
        assert same(batch, model.reference(arrays))


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
        assert same(batch, model.reference(arrays))
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
        assert same(batch, model.reference(arrays))


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
        assert same(batch, model.reference(arrays))


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
        assert same(batch, model.reference(arrays))


def test_parts_run_as_one_batch_and_each_gets_its_rows(lane: LaneEnd, stored: Store, inputs: Inputs) -> None:
    model = stored("cnn?seed=2")
    memory = lane.map()
    lane.load("f", model, 0)
    parts = [inputs(model, rows, rows) for rows in (1, 3, 2)]
    batch = lane.batch("f", model, parts, memory)
    assert lane.answer(batch).error is None
    joined = model.reference({"image": np.concatenate([part["image"] for part in parts])})["scores"]
    for part, rows in enumerate((slice(0, 1), slice(1, 4), slice(4, 6))):
        assert same(batch, {"scores": joined[rows]}, part)


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
        assert same(batch, expected)
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
    assert same(batch, model.reference(arrays))


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
    assert same(batch, model.reference(arrays))


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
    assert same(batch, model.reference(arrays))


BAD_RUNS: dict[str, tuple[Callable[[Run], Run], str, str]] = {
    "too little room for an output": (
        lambda run: replace_output(run, shape=(1, 32), nbytes=128),
        "ExecutionError",
        "output 'scores' is FP32 [1, 64], but room was reserved for FP32 [1, 32]",
    ),
    "room of another type": (lambda run: replace_output(run, dtype="INT32"), "ExecutionError", "room was reserved for INT32 [1, 64]"),
    "an output that the model has not": (
        lambda run: replace_output(run, name="other"),
        "ExecutionError",
        "gave no output 'other', only scores",
    ),
    "an output outside the segment": (lambda run: replace_output(run, offset=16 * MIB), "InvalidTensor", "does not lie in its segment"),
    "an output before the segment": (lambda run: replace_output(run, offset=-256), "InvalidTensor", "does not lie in its segment"),
    "a segment that nobody mapped": (lambda run: msgspec.structs.replace(run, segment=9), "ExecutionError", "segment 9 is not mapped"),
    "an input of the wrong width": (lambda run: replace_input(run, shape=(2, 128)), "ExecutionError", "RuntimeError"),
    "an input that is missing": (lambda run: replace_input(run, name="other"), "ExecutionError", "KeyError"),
}


def replace_output(run: Run, **changes: object) -> Run:
    part = run.parts[0]
    outputs = (msgspec.structs.replace(part.outputs[0], **changes),)
    return msgspec.structs.replace(run, parts=(msgspec.structs.replace(part, outputs=outputs),))


def replace_input(run: Run, **changes: object) -> Run:
    part = run.parts[0]
    inputs = (msgspec.structs.replace(part.inputs[0], **changes),)
    return msgspec.structs.replace(run, parts=(msgspec.structs.replace(part, inputs=inputs),))


def test_a_failed_batch_gets_its_reason_and_the_lane_lives_on(lane: LaneEnd, stored: Store, inputs: Inputs) -> None:
    model = stored("mlp?seed=1")
    memory = lane.map()
    lane.load("f", model, 0)
    arrays = inputs(model, 1, 1)
    for spoil, kind, message in BAD_RUNS.values():
        batch = lane.batch("f", model, [arrays], memory)
        batch.run = spoil(batch.run)
        error = lane.answer(batch).error
        assert error is not None
        assert error[0] == kind
        assert message in error[1]
    batch = lane.batch("f", model, [arrays], memory)
    assert lane.answer(batch).error is None
    assert same(batch, model.reference(arrays))


def test_an_activation_above_the_bound_fails_its_batch_alone(spawn: Spawner, stored: Store, inputs: Inputs) -> None:
    model = stored("mlp?features=16&width=8192&depth=1")
    lane = spawn(activation_bytes=32 * MIB)
    memory = lane.map()
    lane.load("f", model, 0)
    error = lane.answer(lane.batch("f", model, [inputs(model, 8192, 1)], memory)).error
    assert error is not None
    assert error[0] == "ExecutionError"
    assert "memory" in error[1]
    arrays = inputs(model, 4, 1)
    batch = lane.batch("f", model, [arrays], memory)
    assert lane.answer(batch).error is None
    assert same(batch, model.reference(arrays))


def test_attaching_what_is_broken_says_why_and_spoils_nothing_else(lane: LaneEnd, stored: Store, inputs: Inputs) -> None:
    good, other = stored("mlp?seed=1"), stored("cnn?seed=1")
    memory = lane.map()
    lane.load("good", good, 0)
    index = msgspec.json.encode(good.index)
    nowhere = msgspec.json.encode(msgspec.structs.replace(good.index, gates=(msgspec.structs.replace(good.index.gates[0], module="no.such"),)))
    for encoded, path in ((b"{", good.path), (index, other.path), (nowhere, good.path)):
        with path.open("rb") as weights:
            lane.copies.send(Attach("bad", encoded, str(path.parent)), [weights.fileno()])
        attached = lane.next_copy()
        assert isinstance(attached, Attached)
        assert attached.function == "bad"
        assert attached.error
        error = lane.answer(lane.batch("bad", good, [inputs(good, 1, 1)], memory)).error
        assert error == ("InvalidArtifact", attached.error)
    assert lane.answer(lane.batch("good", good, [inputs(good, 1, 1)], memory)).error is None


@pytest.mark.parametrize("how", ["detached", "copied elsewhere"])
def test_a_run_whose_copy_is_given_up_fails_and_does_not_hang(lane: LaneEnd, stored: Store, inputs: Inputs, how: str) -> None:
    model = stored("mlp?seed=1")
    memory = lane.map()
    lane.attach("f", model)
    copy = lane.begin_copy("f", 0, 4096)
    lane.submit(lane.batch("f", model, [inputs(model, 1, 1)], memory, copy=copy))
    lane.until_copied(copy, 4096)
    if how == "detached":
        lane.copies.send(Detach("f"))
    else:
        lane.begin_copy("f", 16 * MIB, 4096)
    done = lane.next_run()
    assert isinstance(done, BatchDone)
    assert done.error is not None
    assert done.error[0] in ("ExecutionError", "Unavailable")


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
    assert same(batch, model.reference(arrays))
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
            assert same(batch, model.reference(arrays))
        lane.copies.send(Detach("f"))
        lane.runs.send(UnmapSegment(2))
        other.close()
    assert settles(open_files, mappings), held(lane.pid)
    lane.copies.send(Detach("kept"))
    assert settles(open_files - 1, mappings - 1), held(lane.pid)


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
