"""Predictors whose submits lie: an error for the sender, nothing for the others, nothing left behind."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contracts.wire import Answer, Cancel, Failed, Submit, TensorRef
from tests.faults.real import Predictor, rows_of, source
from tests.hostile.conftest import Scene
from tests.hostile.messages import MESSAGES, SEGMENT

MANY = settings(max_examples=150)


def _ref(index: int, side: str, **changes: object) -> Callable[[Submit], Submit]:
    """Spoils one tensor of the first part."""

    def spoil(batch: Submit) -> Submit:
        refs = list(getattr(batch.parts[0], side))
        refs[index] = msgspec.structs.replace(refs[index], **changes)
        return msgspec.structs.replace(batch, parts=(msgspec.structs.replace(batch.parts[0], **{side: tuple(refs)}),))

    return spoil


def _field(**changes: object) -> Callable[[Submit], Submit]:
    return lambda batch: msgspec.structs.replace(batch, **changes)


def _part(**changes: object) -> Callable[[Submit], Submit]:
    return lambda batch: msgspec.structs.replace(batch, parts=(msgspec.structs.replace(batch.parts[0], **changes),))


WRONG: dict[str, tuple[Callable[[Submit], Submit], str]] = {
    "another's function": (_field(function="default/others"), "NotPermitted"),
    "a granted name without a function": (_field(function="default/ghost"), "NotFound"),
    "a path": (_field(function="../../../etc/passwd"), "NotPermitted"),
    "a path behind a granted name": (_field(function="default/mine/../others"), "NotPermitted"),
    "a granted name and a NUL": (_field(function="default/mine\0"), "NotPermitted"),
    "the name that lanes use": (_field(function="default/mine@1"), "NotPermitted"),
    "no name": (_field(function=""), "NotPermitted"),
    "a name of a million characters": (_field(function="x" * 1_000_000), "NotPermitted"),
    "an input at -1": (_ref(0, "inputs", offset=-1), "InvalidTensor"),
    "an input at the least number": (_ref(0, "inputs", offset=-(2**63)), "InvalidTensor"),
    "an input at the largest number": (_ref(0, "inputs", offset=2**64 - 1), "InvalidTensor"),
    "an input whose end overflows": (_ref(0, "inputs", offset=2**63 - 32), "InvalidTensor"),
    "an input one byte beyond the segment": (_ref(0, "inputs", offset=SEGMENT - 60), "InvalidTensor"),
    "an input at an odd place": (_ref(0, "inputs", offset=1), "InvalidTensor"),
    "an input of too few bytes": (_ref(0, "inputs", nbytes=63), "InvalidTensor"),
    "an input of too many bytes": (_ref(0, "inputs", nbytes=65), "InvalidTensor"),
    "an input of negative bytes": (_ref(0, "inputs", nbytes=-64), "InvalidTensor"),
    "an input of no rows": (_ref(0, "inputs", shape=(0, 16), nbytes=0), "InvalidTensor"),
    "an input of negative rows": (_ref(0, "inputs", shape=(-1, -16)), "InvalidTensor"),
    "a shape whose product overflows": (_ref(0, "inputs", shape=(2**62, 16), nbytes=0), "InvalidTensor"),
    "a shape of a thousand dimensions": (_ref(0, "inputs", shape=(1,) * 1000), "InvalidTensor"),
    "another rank": (_ref(0, "inputs", shape=(16,)), "InvalidTensor"),
    "another width": (_ref(0, "inputs", shape=(2, 8)), "InvalidTensor"),
    "another datatype of the same size": (_ref(0, "inputs", dtype="INT32"), "InvalidTensor"),
    "a datatype that there is not": (_ref(0, "inputs", dtype="\0"), "InvalidTensor"),
    "an input of another name": (_ref(0, "inputs", name="../features"), "InvalidTensor"),
    "an output over the end": (_ref(0, "outputs", offset=SEGMENT - 8), "InvalidTensor"),
    "an output before the beginning": (_ref(0, "outputs", offset=-16), "InvalidTensor"),
    "an output at an odd place": (_ref(0, "outputs", offset=2), "InvalidTensor"),
    "an output of another size": (_ref(0, "outputs", nbytes=8), "InvalidTensor"),
    "an output of another shape": (_ref(0, "outputs", shape=(4, 1)), "InvalidTensor"),
    "an output of another datatype": (_ref(0, "outputs", dtype="INT32"), "InvalidTensor"),
    "no inputs": (_part(inputs=()), "InvalidTensor"),
    "no outputs": (_part(outputs=()), "InvalidTensor"),
    "no rows": (_part(rows=0), "InvalidTensor"),
    "negative rows": (_part(rows=-1), "InvalidTensor"),
    "more rows than the tensors": (_part(rows=2**63), "InvalidTensor"),
    "no parts": (_field(parts=()), "InvalidTensor"),
    "more parts than the function joins": (lambda batch: msgspec.structs.replace(batch, parts=batch.parts * 1000), "InvalidTensor"),
    "a deadline long past": (_field(deadline_ns=1, slo_deadline_ns=1), "Refused"),
    "a deadline before time began": (_field(deadline_ns=-(2**63), slo_deadline_ns=-(2**63)), "Refused"),
}


@pytest.mark.parametrize(("spoil", "kind"), WRONG.values(), ids=WRONG)
def test_a_wrong_submit_fails_alone(spoil: Callable[[Submit], Submit], kind: str, scene: Scene) -> None:
    hostile = Predictor(scene.agent.run_dir, SEGMENT)
    batch = spoil(hostile.batch("default/mine", rows_of(1)))
    hostile.channel.send(batch)
    outcome = hostile.outcome(batch)
    assert isinstance(outcome, Failed)
    assert outcome.kind == kind
    assert len(outcome.message) < 1000
    assert hostile.serves("default/mine", source(1)), "its connection goes on"
    hostile.close()
    scene.undisturbed()


EXTREMES: dict[str, dict[str, int]] = {
    "deadlines at the largest number": {"deadline_ns": 2**63 - 1, "slo_deadline_ns": 2**63 - 1},
    "deadlines beyond 63 bits": {"deadline_ns": 2**64 - 1, "slo_deadline_ns": 2**64 - 1},
    "an SLO before time began": {"slo_deadline_ns": -(2**63)},
    "an SLO behind the deadline": {"slo_deadline_ns": 2**63},
}


@pytest.mark.parametrize("fields", EXTREMES.values(), ids=EXTREMES)
def test_extreme_deadlines_harm_nobody(fields: dict[str, int], scene: Scene) -> None:
    hostile = Predictor(scene.agent.run_dir, SEGMENT)
    for _ in range(20):
        batch = _field(**fields)(hostile.batch("default/mine", rows_of(2)))
        hostile.channel.send(batch)
        assert hostile.check(batch, source(1))
    hostile.close()
    scene.undisturbed()


@pytest.mark.parametrize("number", [0, -1, -(2**63), 2**63 - 1, 2**63, 2**64 - 1])
def test_ids_are_the_senders_own_and_come_back_as_they_were(number: int, scene: Scene) -> None:
    hostile = Predictor(scene.agent.run_dir, SEGMENT)
    for _ in range(2):
        batch = _field(id=number)(hostile.batch("default/mine", rows_of(3)))
        hostile.channel.send(batch)
        assert hostile.check(batch, source(1))
        del hostile.outcomes[number]
    hostile.close()
    scene.undisturbed()


def test_cancelling_what_is_a_strangers_or_nobodys_changes_nothing(scene: Scene) -> None:
    hostile = Predictor(scene.agent.run_dir, SEGMENT)
    for number in [*range(-1, 2000), 2**63, 2**64 - 1]:
        hostile.channel.send(Cancel(number))
    assert hostile.serves("default/mine", source(1))
    scene.undisturbed()
    hostile.close()


def test_a_cancelled_batch_has_one_outcome_however_often_it_is_cancelled(scene: Scene) -> None:
    hostile = Predictor(scene.agent.run_dir, SEGMENT)
    batches = [hostile.submit("default/mine", rows_of(number)) for number in range(50)]
    for batch in reversed(batches):
        hostile.channel.send(Cancel(batch.id))
        hostile.channel.send(Cancel(batch.id))
    for batch in batches:
        hostile.check(batch, source(1))
    assert hostile.serves("default/mine", source(1))
    hostile.close()
    scene.undisturbed()


def test_outputs_over_another_batchs_inputs_hurt_only_their_owner(scene: Scene) -> None:
    """A predictor may spoil its own memory as it likes, while lanes read and write there."""
    hostile = Predictor(scene.agent.run_dir, SEGMENT)
    stop = threading.Event()

    def scribble() -> None:
        while not stop.is_set():
            hostile.memory[:4096] = os.urandom(4096)

    scribbler = threading.Thread(target=scribble)
    scribbler.start()
    for _ in range(50):
        batch = _part(outputs=(TensorRef("scores", "FP32", (1, 4), 0, 16),), inputs=(TensorRef("features", "FP32", (1, 16), 0, 64),))(
            hostile.batch("default/mine", rows_of(1))
        )
        hostile.channel.send(batch)
        assert isinstance(hostile.outcome(batch), Answer)
    stop.set()
    scribbler.join()
    hostile.close()
    scene.undisturbed()


@MANY
@given(st.lists(MESSAGES, max_size=12))
def test_any_submits_and_cancels_in_any_order_are_answered_once_each(scene: Scene, messages: list[Submit | Cancel]) -> None:
    """Until the sender repeats an id that is not answered yet: then it may be closed."""
    hostile = Predictor(scene.agent.run_dir, SEGMENT)
    hostile.memory[:64] = np.ones(16, "<f4").tobytes()
    hostile.ids = itertools.count(1000)
    sent: list[int] = []
    for message in messages:
        if isinstance(message, Submit) and message.id in sent:
            continue
        if isinstance(message, Submit):
            sent.append(message.id)
        hostile.channel.send(message)
    while len(hostile.outcomes) < len(sent):
        assert hostile.receive(), "the agent closed a predictor that kept to the protocol"
    assert hostile.serves("default/mine", source(1)), "and nothing more comes of the old ids"
    hostile.close()
