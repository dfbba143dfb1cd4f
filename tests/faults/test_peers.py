"""Two devices with a fast way between them, real models and lanes: weights that came from the other device give the same answers, whoever dies."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from contracts.wire import Failed, Submit
from tests.faults import census
from tests.faults.real import Agent, Predictor, connected, function, rows_of, source, until
from tests.nodeagent.node import Control

MODELS = {f"default/f{seed}": source(seed, width=1024, depth=3) for seed in range(3)}
"""Of about 8 MiB each; a device holds two of them, and half a second of its link to the host brings one."""
Served = tuple[Agent, Control, Predictor]


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    arguments = ("--device", "cpu:1", "--link-bandwidth", "16Mi", "--peer-bandwidth", "4Gi")
    with tempfile.TemporaryDirectory(prefix="sluice-peers-", dir="/tmp") as folder:
        agent = Agent(Path(folder), *arguments, memory="20Mi")
        try:
            with connected(agent) as (control, predictor):
                for key, model in MODELS.items():
                    control.declare(function(key.removeprefix("default/"), model))
                    until(lambda key=key, model=model: predictor.serves(key, model), f"the first answer of {key}")
                agent.settle(functions=len(MODELS))
                yield agent, control, predictor
        finally:
            agent.end()


def load(predictor: Predictor, count: int) -> list[tuple[str, Submit]]:
    """Batches that take some milliseconds, several of a function at once, so that the device that holds it is busy."""
    keys = list(MODELS)
    return [(keys[number // 4 % len(keys)], predictor.submit(keys[number // 4 % len(keys)], rows_of(number, 50))) for number in range(count)]


def peer_swaps(control: Control) -> int:
    return sum(device.peer_swaps for device in control.status().devices)


def swap_between_devices(served: Served, rounds: int = 60) -> None:
    """Loads the node until weights have gone from device to device."""
    _, control, predictor = served
    before = peer_swaps(control)
    for _ in range(rounds):
        for key, batch in load(predictor, 24):
            assert predictor.check(batch, MODELS[key]), predictor.outcomes[batch.id]
        if peer_swaps(control) > before + 2:
            return
    raise AssertionError("no weights went from device to device")


def test_answers_are_those_of_the_model_wherever_its_weights_came_from(served: Served) -> None:
    swap_between_devices(served)
    served[0].leaks_nothing()


@pytest.mark.parametrize("device", ["cpu:0", "cpu:1"])
def test_no_answer_is_wrong_when_lanes_die_that_copy_or_are_copied_from(served: Served, device: str) -> None:
    agent, control, predictor = served
    swap_between_devices(served)
    for round_ in range(4):
        batches = load(predictor, 24)
        predictor.outcome(batches[2 + 3 * round_][1])
        pids = {lane.pid for found in control.status().devices if found.device == device for lane in found.lanes}
        census.kill([process for process in agent.processes("lane") if process.pid in pids])
        for key, batch in batches:
            if not predictor.check(batch, MODELS[key]):
                outcome = predictor.outcomes[batch.id]
                assert isinstance(outcome, Failed) and outcome.kind == "Unavailable", outcome
    swap_between_devices(served)
    agent.leaks_nothing()
