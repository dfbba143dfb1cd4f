"""The real agent, loader, fork server and lanes: every answer equals the same batch run without swapping, bit for bit, whatever dies."""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Iterator

import pytest

from contracts.functions import Function, Share
from contracts.wire import Answer, Failed, Submit
from tests.faults.census import alive, command
from tests.nodeagent.node import Control, Node, eventually, short_folder
from tests.nodeagent.unswapped import Caller, check, draw, model

FUNCTIONS = 12


def _function(number: int) -> Function:
    return Function(f"f{number}", model(number), share=Share(100, 500))


def _start(run_dir: os.PathLike[str]) -> tuple[Node, Control]:
    node = Node(run_dir, module="nodeagent", memory="12Mi", host="256Mi").ready()
    control = Control(node.run_dir)
    control.grant()
    control.declare(*map(_function, range(FUNCTIONS)))
    return node, control


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[Node, Control]]:
    """A node whose device holds three of its twelve models, for all tests of this file; the last one kills it."""
    with short_folder() as folder:
        node, control = _start(folder / "run")
        yield node, control
        control.channel.close()
        node.remove()


def test_every_answer_equals_the_unswapped_reference(served: tuple[Node, Control]) -> None:
    node, control = served
    caller = Caller(node)
    chance = random.Random(20)
    answered = []
    for turn in range(10):
        sent = []
        for number in chance.sample(range(FUNCTIONS), FUNCTIONS):
            parts = [draw(number, rows, turn) for rows in chance.choice([(1,), (3,), (1, 2), (2, 1, 1)])]
            sent.append((number, parts, caller.submit(number, parts)))
        for number, parts, batch in sent:
            check(number, parts, caller.answer(batch))
            answered.append(parts)
    status = control.status()
    assert sum(function.answered for function in status.functions) == sum(len(parts) for parts in answered)
    assert status.devices[0].swaps > FUNCTIONS
    assert all(function.failed == 0 for function in status.functions)


def test_kill_9_of_lanes_under_load_loses_no_request_and_changes_no_answer(served: tuple[Node, Control]) -> None:
    node, control = served
    caller = Caller(node)
    parts = [draw(0, 1, 1)]
    check(0, parts, caller.answer(caller.submit(0, parts)))
    for turn in range(3):
        sent = [(number, draw(number, 2, turn)) for number in range(FUNCTIONS)]
        batches = [caller.submit(number, [inputs]) for number, inputs in sent]
        victim = eventually(lambda: next((lane.pid for lane in control.status().devices[0].lanes if lane.pid), 0), "a lane")
        os.kill(victim, signal.SIGKILL)
        for (number, inputs), batch in zip(sent, batches, strict=True):
            outcome = caller.predictor.outcome(batch)
            if isinstance(outcome, Failed):
                assert outcome.kind == "Unavailable"
            else:
                check(number, [inputs], caller.answer(batch))
    check(0, parts, caller.answer(caller.submit(0, parts)))


def test_a_changed_share_is_felt_at_once_and_loses_nothing(served: tuple[Node, Control]) -> None:
    node, control = served
    caller = Caller(node)
    inputs = draw(1, 1, 3)
    stop = threading.Event()
    batches: list[Submit] = []

    def call() -> None:
        while not stop.is_set():
            batches.append(caller.submit(1, [inputs]))
            check(1, [inputs], caller.answer(batches[-1]))

    thread = threading.Thread(target=call)
    thread.start()
    for sm_percent in (50, 10, 100):
        control.share("default/f1", Share(sm_percent, 500))
        eventually(lambda size=sm_percent: any(lane.sm_percent == size and lane.pid for lane in control.status().devices[0].lanes), "its lane")
    stop.set()
    thread.join()
    assert all(isinstance(caller.predictor.outcomes[batch.id], Answer) for batch in batches)


def test_kill_9_of_the_agent_leaves_no_process_and_the_next_serves_without_loading(served: tuple[Node, Control]) -> None:
    node, _ = served
    caller = Caller(node)
    parts = [draw(5, 1, 7)]
    check(5, parts, caller.answer(caller.submit(5, parts)))
    children = node.children()
    files = {path.name: path.stat().st_ino for path in node.store.iterdir()}
    node.kill()
    eventually(lambda: not any(map(alive, children)), "the end of its processes")
    again, _ = _start(node.run_dir)
    try:
        assert {path.name: path.stat().st_ino for path in again.store.iterdir()} == files
        assert not any("models.loader" in command(child) for child in again.children())
        caller = Caller(again)
        check(5, parts, caller.answer(caller.submit(5, parts)))
    finally:
        assert again.terminate() == 0
        again.remove()
