"""Functions that go, change or come again while their requests run: old work ends with the old weights, new work begins with the new ones."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from contracts.errors import NotFound
from contracts.functions import FunctionClass
from contracts.wire import Answer, Failed
from tests.faults.real import Agent, Predictor, connected, expected, function, rows_of, source, until
from tests.nodeagent.node import Control

NEIGHBOUR = source(100)


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[Agent, Control, Predictor]]:
    """One agent whose link is slow enough (32 MiB/s) that copies are under way when functions go, and a neighbour that must not notice."""
    with tempfile.TemporaryDirectory(prefix="sluice-faults-", dir="/tmp") as folder:
        agent = Agent(Path(folder), "--link-bandwidth", "32Mi", memory="12Mi")
        try:
            with connected(agent) as (control, predictor):
                control.declare(function("neighbour", NEIGHBOUR))
                until(lambda: predictor.serves("default/neighbour", NEIGHBOUR), "the first answer")
                agent.settle(functions=1)
                yield agent, control, predictor
                agent.leaks_nothing()
        finally:
            agent.end()


def of_one(predictor: Predictor, batch, sources: list[str]) -> str:  # type: ignore[no-untyped-def]
    """Which of these models gave the answer: to the last bit one of them, never a mixture."""
    rows = np.frombuffer(predictor.memory, "<f4", batch.parts[0].inputs[0].nbytes // 4, batch.parts[0].inputs[0].offset).reshape(1, -1)
    ref = batch.parts[0].outputs[0]
    scores = np.frombuffer(predictor.memory, "<f4", ref.nbytes // 4, ref.offset).reshape(ref.shape)
    (found,) = [each for each in sources if np.array_equal(scores, expected(each, rows.copy()))]
    return found


@pytest.mark.parametrize("cls", FunctionClass)
def test_a_function_that_is_removed_while_its_requests_run(cls: FunctionClass, served: tuple[Agent, Control, Predictor]) -> None:
    _, control, predictor = served
    model = source(1, width=512, depth=5)
    for round_ in range(4):
        control.declare(function("gone", model, cls=cls))
        batches = [predictor.submit("default/gone", rows_of(number)) for number in range(40)]
        if round_:
            predictor.outcome(batches[round_])
        control.remove("default/gone")
        late = predictor.submit("default/gone", rows_of(1))
        assert predictor.serves("default/neighbour", NEIGHBOUR)
        for batch in batches:
            outcome = predictor.outcome(batch)
            if isinstance(outcome, Answer):
                assert predictor.check(batch, model)
            else:
                assert outcome.kind == "NotFound", outcome
        outcome = predictor.outcome(late)
        assert isinstance(outcome, Failed)
        assert outcome.kind == "NotFound"
        with pytest.raises(NotFound):
            control.remove("default/gone")


@pytest.mark.parametrize("way", ["removed and declared again", "declared anew in one step"])
def test_a_name_that_gets_other_weights_while_the_old_ones_run_or_are_copied(way: str, served: tuple[Agent, Control, Predictor]) -> None:
    """What was submitted before is of the old weights (or fails), what comes after is of the new: neither attachment serves the other's requests."""
    _, control, predictor = served
    models = [source(seed, width=512, depth=5) for seed in range(200, 204)]
    control.declare(function("name", models[0]))
    predictor.outcome(predictor.submit("default/name", rows_of(0)))
    control.declare(*(function(f"spare{number}", model) for number, model in enumerate(models)))
    for round_ in range(12):
        old, new = models[round_ % 4], models[(round_ + 1) % 4]
        before = [predictor.submit("default/name", rows_of(number)) for number in range(10)]
        if round_ % 3:
            predictor.outcome(before[round_ % 3])
        if way == "removed and declared again":
            control.remove("default/name")
        control.declare(function("name", new))
        after = [predictor.submit("default/name", rows_of(number)) for number in range(10)]
        for batch in before:
            if isinstance(predictor.outcome(batch), Answer):
                assert of_one(predictor, batch, models) == old
        for batch in after:
            assert isinstance(predictor.outcome(batch), Answer), predictor.outcome(batch)
            assert of_one(predictor, batch, models) == new
        assert predictor.serves("default/neighbour", NEIGHBOUR)
    control.remove("default/name")
    for number in range(4):
        control.remove(f"default/spare{number}")


def test_two_names_of_one_model_share_its_weights_and_go_alone(served: tuple[Agent, Control, Predictor]) -> None:
    agent, control, predictor = served
    model = source(300)
    control.declare(function("one", model), function("two", model))
    assert len(list(agent.store.glob("*.weights"))) == 2
    assert predictor.serves("default/one", model)
    control.remove("default/one")
    assert predictor.serves("default/two", model)
    control.remove("default/two")
