"""A lane process and what goes wrong in it: bad runs, broken models, a copy that is given up. The batch fails, the lane lives on."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import pytest

from contracts.lane_wire import Attach, Attached, BatchDone, Detach, Run
from contracts.units import MIB

if TYPE_CHECKING:
    from tests.predictor.worker.conftest import LaneEnd, Stored

    Spawner = Callable[..., LaneEnd]
    Store = Callable[[str], Stored]
    Inputs = Callable[[Stored, int, int], dict[str, np.ndarray]]


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
    assert batch.gives(model.reference(arrays))


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
    assert batch.gives(model.reference(arrays))


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
