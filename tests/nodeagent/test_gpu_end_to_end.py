"""The real agent, loader, slab holder and lanes on a fake GPU's driver: every answer equals the unswapped model's, also when holder and lanes die."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator

import psutil
import pytest

from contracts.functions import Function, Share
from contracts.wire import Answer, Submit
from tests.faults.census import alive, command
from tests.nodeagent.node import Control, Node, eventually, short_folder
from tests.nodeagent.unswapped import Arrays, Caller, check, draw, model

FUNCTIONS = 6
SIZES = (100, 50, 25)


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[Node, Control]]:
    """A node whose GPU holds three of its six models, in lanes of three sizes."""
    os.environ["FAKE_BELOW"] = "driver"
    try:
        with short_folder() as folder:
            node = Node(folder / "run", "--device", "cuda:0", module="tests.fakes.gpu_agent", memory="12Mi", host="256Mi").ready()
            control = Control(node.run_dir)
            control.grant()
            for number in range(FUNCTIONS):
                share = Share(SIZES[number % len(SIZES)], 500)
                control.declare(Function(f"f{number}", model(number), share=share))
            yield node, control
            children = node.children()
            control.channel.close()
            assert node.terminate() == 0
            assert not [child for child in children if alive(child)]
            node.remove()
    finally:
        del os.environ["FAKE_BELOW"]


def send(caller: Caller, turn: int) -> list[tuple[int, Arrays, Submit]]:
    """A batch for each function."""
    sent = [(number, draw(number, 2, turn)) for number in range(FUNCTIONS)]
    return [(number, inputs, caller.submit(number, [inputs])) for number, inputs in sent]


def test_lanes_of_a_gpu_answer_as_the_unswapped_models_do(served: tuple[Node, Control]) -> None:
    node, control = served
    caller = Caller(node)
    for turn in range(10):
        for number, inputs, batch in send(caller, turn):
            check(number, [inputs], caller.answer(batch))
    (device,) = control.status().devices
    assert device.backend == "mps" and device.swaps > FUNCTIONS
    assert {lane.sm_percent for lane in device.lanes} == set(SIZES)


DEATHS: dict[str, Callable[[Node, Control], int]] = {
    "the slab holder": lambda node, _: next(child.pid for child in node.children() if "tests.predictor.worker.fake_cuda_holder" in command(child)),
    "a lane": lambda _, control: next(lane.pid for lane in control.status().devices[0].lanes if lane.pid),
}


@pytest.mark.parametrize("victim", DEATHS.values(), ids=DEATHS)
def test_no_answer_is_wrong_when_processes_die(victim: Callable[[Node, Control], int], served: tuple[Node, Control]) -> None:
    node, control = served
    caller = Caller(node)
    for number, inputs, batch in send(caller, 20):
        check(number, [inputs], caller.answer(batch))
    pid, sent = victim(node, control), send(caller, 21)
    os.kill(pid, signal.SIGKILL)
    for number, inputs, batch in sent + send(caller, 22):
        outcome = caller.predictor.outcome(batch)
        if isinstance(outcome, Answer):
            check(number, [inputs], caller.answer(batch))
        else:
            assert outcome.kind == "Unavailable", outcome
    eventually(lambda: not psutil.pid_exists(pid) and control.status().devices[0].state == "up", "the return of what died")
    for number, inputs, batch in send(caller, 23):
        check(number, [inputs], caller.answer(batch))
