"""A whole lane process on a CUDA device, down to the driver seam: the same answers, bit for bit, as the model run directly."""

from __future__ import annotations

import os
import select
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from contracts.lane_wire import Attached, BatchDone, BatchPaused, CopyGrant, Detach, Resume
from contracts.units import MIB
from tests.predictor.worker.conftest import ForkServer, LaneEnd
from tests.predictor.worker.fake_cuda import SMS, WHOLE_NS

if TYPE_CHECKING:
    from tests.predictor.worker.conftest import Stored

    Store = Callable[[str], Stored]
    Inputs = Callable[[Stored, int, int], dict[str, np.ndarray]]

CUDA = {"device": "cuda:0", "backend": "mps", "sms": SMS, "lane_sms": SMS, "piece_bytes": MIB, "whole_ns": WHOLE_NS}
MODELS = {
    "a perceptron": "mlp?seed=1",
    "a convolutional network": "cnn?seed=2",
    "a transformer encoder": "bert-base?seed=3&num_hidden_layers=2&hidden_size=48&intermediate_size=64&vocab_size=1000",
    "a transformer decoder": "gpt2?seed=3&n_layer=2&n_embd=64&n_head=4&vocab_size=1000",
}


@pytest.fixture(scope="module")
def cuda_server() -> Iterator[ForkServer]:
    server = ForkServer("tests.predictor.worker.fake_cuda_worker")
    yield server
    server.close_lanes()
    server.channel.close()
    assert server.process.wait(60) == 0


@pytest.fixture
def start(cuda_server: ForkServer) -> Iterator[Callable[..., LaneEnd]]:
    yield lambda **changes: cuda_server.spawn(**CUDA | changes)
    cuda_server.close_lanes()


def let_idle(lane: LaneEnd) -> None:
    """Gives the lane an idle moment, in which nothing may come from it."""
    assert not select.select([lane.runs], [], [], 0.15)[0]


@pytest.mark.parametrize("source", MODELS.values(), ids=MODELS)
def test_answers_are_those_of_the_model_cold_warm_and_recorded(start: Callable[..., LaneEnd], stored: Store, inputs: Inputs, source: str) -> None:
    model = stored(source)
    total = model.index.total_bytes
    lane = start()
    memory = lane.map()
    lane.attach("f", model)
    for offset in (0, 256):
        lane.slab[offset : offset + total] = os.urandom(total)
        copy = lane.begin_copy("f", offset, total // 3)
        cold = lane.batch("f", model, [inputs(model, 2, 1)], memory, offset, copy=copy)
        lane.submit(cold)
        lane.copies.send(CopyGrant(copy, total))
        done = lane.next_run()
        assert isinstance(done, BatchDone)
        assert done.error is None
        assert cold.gives(model.reference(inputs(model, 2, 1)))
        lane.until_copied(copy, total)
        for turn in range(6):
            arrays = inputs(model, 1 + turn % 2, turn)
            batch = lane.batch("f", model, [arrays], memory, offset)
            done = lane.answer(batch)
            assert done.error is None
            assert done.gpu_ns > 0
            assert batch.gives(model.reference(arrays))
            if turn > 2:
                let_idle(lane)


def test_functions_of_one_program_keep_their_own_weights_when_recorded(start: Callable[..., LaneEnd], stored: Store, inputs: Inputs) -> None:
    lane = start()
    memory = lane.map()
    models = {"first": (stored("mlp?seed=1"), 0), "second": (stored("mlp?seed=2"), 16 * MIB)}
    for name, (model, offset) in models.items():
        lane.load(name, model, offset)
    for turn in range(5):
        for name, (model, offset) in models.items():
            arrays = inputs(model, 2, turn)
            batch = lane.batch(name, model, [arrays], memory, offset)
            assert lane.answer(batch).error is None
            assert batch.gives(model.reference(arrays))
        let_idle(lane)


def test_a_batch_pauses_at_its_gates_and_goes_on(start: Callable[..., LaneEnd], stored: Store, inputs: Inputs) -> None:
    model = stored("mlp?seed=5")
    lane = start()
    lane.load("f", model, 0)
    arrays = inputs(model, 2, 1)
    batch = lane.batch("f", model, [arrays], lane.map(), preemptible=True)
    lane.page.pause_batch = batch.run.batch
    lane.submit(batch)
    pauses = 0
    while isinstance(message := lane.next_run(), BatchPaused):
        pauses += 1
        lane.runs.send(Resume(batch.run.batch))
    assert isinstance(message, BatchDone)
    assert message.error is None
    assert pauses >= 3
    assert batch.gives(model.reference(arrays))


def test_a_lane_says_what_it_read_back_and_what_it_measured(start: Callable[..., LaneEnd]) -> None:
    ready = start(sm_percent=25, lane_sms=33, environment={"CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": "25"}).ready
    assert ready is not None
    assert ready.sms == 33, "the environment reached the driver before it was opened"
    assert 0 < ready.measured_sm_percent < 26
    unlimited = start(sm_percent=25, lane_sms=33).ready
    assert unlimited is not None
    assert unlimited.sms == SMS, "a lane that was not told reads back the whole device, and says so"


@pytest.mark.parametrize("environment", [{}, {"FAKE_CUDA_WRITABLE": "1"}], ids=["as it should be", "where the driver cannot pin what is read only"])
def test_weights_are_mapped_for_reading_alone_wherever_they_can_be_pinned_so(
    start: Callable[..., LaneEnd], stored: Store, inputs: Inputs, environment: dict[str, str]
) -> None:
    model = stored("mlp?seed=1")
    lane = start(environment=environment)
    memory = lane.map()
    lane.load("f", model, 0)
    arrays = inputs(model, 1, 1)
    for name in ("f", "g"):
        batch = lane.batch("f", model, [arrays], memory)
        assert lane.answer(batch).error is None
        assert batch.gives(model.reference(arrays))
        lane.attach(name + "-after-the-first-was-pinned", model)


def test_an_error_of_cuda_ends_the_lane(start: Callable[..., LaneEnd], stored: Store, inputs: Inputs, tmp_path: Path) -> None:
    model = stored("mlp?seed=1")
    lane = start(environment={"FAKE_CUDA_BREAKS": str(tmp_path / "broken")})
    memory = lane.map()
    lane.load("f", model, 0)
    assert lane.answer(lane.batch("f", model, [inputs(model, 1, 1)], memory)).error is None
    (tmp_path / "broken").touch()
    lane.submit(lane.batch("f", model, [inputs(model, 1, 1)], memory))
    assert lane.runs.receive() is None
    assert lane.gone()


def test_a_token_outside_the_vocabulary_fails_its_batch_before_it_reaches_the_device(start: Callable[..., LaneEnd], stored: Store) -> None:
    model = stored(MODELS["a transformer decoder"])
    lane = start()
    memory = lane.map()
    lane.load("f", model, 0)
    for bad, good in ((1000, 999), (-1, 0)):
        error = lane.answer(lane.batch("f", model, [{"input_ids": np.array([[1, bad, 2]])}], memory)).error
        assert error is not None
        assert error[0] == "InvalidTensor"
        assert lane.answer(lane.batch("f", model, [{"input_ids": np.array([[1, good, 2]])}], memory)).error is None


def test_functions_come_and_go_while_others_run(start: Callable[..., LaneEnd], stored: Store, inputs: Inputs) -> None:
    model, other = stored("mlp?seed=1"), stored("cnn?seed=1")
    lane = start()
    memory = lane.map()
    lane.load("stays", model, 0)
    for turn in range(4):
        lane.load(f"goes-{turn}", other, 16 * MIB)
        for name, kept, offset in (("stays", model, 0), (f"goes-{turn}", other, 16 * MIB)):
            arrays = inputs(kept, 1, turn)
            batch = lane.batch(name, kept, [arrays], memory, offset)
            assert lane.answer(batch).error is None
            assert batch.gives(kept.reference(arrays))
        lane.copies.send(Detach(f"goes-{turn}"))


def test_a_function_runs_while_the_weights_of_others_and_its_own_are_pinned(
    start: Callable[..., LaneEnd], stored: Store, inputs: Inputs, tmp_path: Path
) -> None:
    gate, other, model = tmp_path / "gate", stored("mlp?seed=2"), stored("mlp?seed=1")
    lane = start(environment={"FAKE_CUDA_PINS": str(gate)})
    memory = lane.map()
    lane.send_attach("other", other)
    lane.send_attach("f", model)
    copy = lane.begin_copy("f", 0, model.index.total_bytes)
    batch = lane.batch("f", model, [inputs(model, 2, 1)], memory, copy=copy)
    assert lane.answer(batch).error is None
    assert batch.gives(model.reference(inputs(model, 2, 1)))
    lane.until_copied(copy, model.index.total_bytes)
    gate.touch()
    assert [lane.next_copy() for _ in range(2)] == [Attached("other"), Attached("f")]


def test_weights_that_the_driver_will_not_pin_are_copied_all_the_same(start: Callable[..., LaneEnd], stored: Store, inputs: Inputs) -> None:
    model = stored("mlp?seed=1")
    lane = start(environment={"FAKE_CUDA_PINNABLE": str(model.index.total_bytes - 1)})
    memory = lane.map()
    lane.send_attach("f", model)
    assert lane.next_copy() == Attached("f", pinned=False)
    lane.until_copied(lane.begin_copy("f", 0, model.index.total_bytes), model.index.total_bytes)
    batch = lane.batch("f", model, [inputs(model, 2, 1)], memory)
    assert lane.answer(batch).error is None
    assert batch.gives(model.reference(inputs(model, 2, 1)))
    lane.copies.send(Detach("f"))
    lane.send_attach("f", model)
    assert lane.next_copy() == Attached("f", pinned=False)
