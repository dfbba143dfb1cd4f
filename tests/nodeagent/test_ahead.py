"""Lanes of a GPU attach functions before anybody calls them: which, in what order, and who waits for it. Agent and lanes are processes."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from contracts.errors import ExecutionError, NotFound
from contracts.functions import Function, Share
from contracts.wire import Answer
from tests.nodeagent.gpus import ROWS, Gpus
from tests.nodeagent.node import Control, eventually, function

HALF, WHOLE = Share(50, 1000), Share(100, 1000)


def attached(agent: Gpus) -> dict[int, int]:
    """How many functions its lanes have attached, by the lanes' size."""
    return {lane.sm_percent: lane.attached for lane in agent.control.status().devices[0].lanes if lane.state != "starting"}


def declared(agent: Gpus, *functions: Function) -> threading.Thread:
    """Declares functions on a connection of its own, while the test goes on."""

    def declare() -> None:
        control = Control(agent.node.run_dir)
        control.declare(*functions)
        control.channel.close()

    thread = threading.Thread(target=declare)
    thread.start()
    return thread


def test_lanes_attach_the_functions_of_their_size_before_the_first_request(gpus: Callable[..., Gpus]) -> None:
    agent = gpus()
    agent.control.declare(
        function("a", "add?value=1", share=HALF), function("b", "add?value=2", share=HALF), function("c", "add?value=3", share=WHOLE)
    )
    eventually(lambda: attached(agent) == {50: 2, 100: 1}, "the attaching of all")
    agent.control.share("default/c", HALF)
    eventually(lambda: attached(agent) == {50: 3, 100: 1}, "the attaching to its new lane")
    agent.control.remove("default/b")
    eventually(lambda: attached(agent) == {50: 2, 100: 1}, "the detaching of what was removed")
    assert agent.control.status().devices[0].swaps == 0
    assert agent.answers("default/a", 1) and agent.answers("default/c", 3)


def test_a_lane_that_takes_the_place_of_another_attaches_what_waits_first_and_then_what_is_called_most(
    gpus: Callable[..., Gpus], folder: Path
) -> None:
    agent, told = gpus(), folder / "told"
    for number in range(6):
        agent.control.declare(function(f"f{number}", f"add?value={number}&told={told}", share=WHOLE))
    eventually(lambda: attached(agent) == {100: 6}, "the attaching of all")
    for _ in range(20):
        assert agent.answers("default/f4", 4)
    assert agent.answers("default/f2", 2)
    told.unlink()
    os.kill(agent.lanes()[0], signal.SIGKILL)
    assert agent.answers("default/f1", 1)
    names = eventually(lambda: told.exists() and len(found := told.read_text().split()) == 6 and found, "the attaching of all to the new lane")
    names = [name.partition("@")[0] for name in names]
    assert names[:3] == ["default/f1", "default/f4", "default/f2"]
    assert sorted(names) == [f"default/f{number}" for number in range(6)], "each once"


def test_a_function_is_ready_once_a_lane_of_its_size_has_pinned_it_and_others_run_meanwhile(gpus: Callable[..., Gpus], folder: Path) -> None:
    agent, gate = gpus(), folder / "gate"
    agent.control.declare(function("a", "add?value=1", share=WHOLE))
    eventually(lambda: attached(agent) == {100: 1}, "a lane")
    thread = declared(agent, function("b", f"add?value=2&pin={gate}", share=WHOLE))
    eventually(lambda: any(each.key == "default/b" for each in agent.control.status().functions), "the declaration")
    assert agent.answers("default/a", 1)
    assert agent.control.function("default/b").state == "loading"
    gate.touch()
    thread.join()
    assert agent.control.function("default/b").state == "ready"
    assert agent.answers("default/b", 2)


def test_a_function_without_a_lane_of_its_size_is_ready_at_once_and_its_first_batch_waits_for_no_pinning(
    gpus: Callable[..., Gpus], folder: Path
) -> None:
    agent = gpus()
    agent.control.declare(function("a", f"add?value=1&pin={folder / 'never'}", share=WHOLE))
    assert agent.answers("default/a", 1)
    assert attached(agent) == {100: 0}
    (folder / "never").touch()
    eventually(lambda: attached(agent) == {100: 1}, "the pinning")


def test_a_function_that_no_lane_can_build_is_never_ready(gpus: Callable[..., Gpus]) -> None:
    agent = gpus()
    agent.control.declare(function("a", "add?value=1", share=WHOLE))
    eventually(lambda: attached(agent) == {100: 1}, "a lane")
    with pytest.raises(ExecutionError, match="cannot be built"):
        agent.control.declare(function("b", "add?fault=attach", share=WHOLE))
    assert agent.control.function("default/b").state == "failed"
    assert attached(agent) == {100: 1}
    agent.control.declare(function("b", "add?value=2", share=WHOLE))
    assert agent.answers("default/b", 2)


def test_a_lane_that_dies_while_it_pins_holds_nobody_up(gpus: Callable[..., Gpus], folder: Path) -> None:
    agent, gate = gpus(), folder / "gate"
    agent.control.declare(function("a", "add?value=1", share=WHOLE))
    eventually(lambda: attached(agent) == {100: 1}, "a lane")
    thread = declared(agent, function("b", f"add?value=2&pin={gate}&told={folder / 'told'}", share=WHOLE))
    eventually((folder / "told").exists, "its attaching")
    os.kill(agent.lanes()[0], signal.SIGKILL)
    thread.join()
    gate.touch()
    assert agent.answers("default/b", 2)


def test_a_function_that_is_removed_while_it_is_pinned_is_forgotten(gpus: Callable[..., Gpus], folder: Path) -> None:
    agent, gate = gpus(), folder / "gate"
    agent.control.declare(function("a", "add?value=1", share=WHOLE))
    eventually(lambda: attached(agent) == {100: 1}, "a lane")
    failed = []

    def declare() -> None:
        try:
            Control(agent.node.run_dir).declare(function("b", f"add?value=2&pin={gate}&told={folder / 'told'}", share=WHOLE))
        except NotFound as error:
            failed.append(error)

    thread = threading.Thread(target=declare)
    thread.start()
    eventually((folder / "told").exists, "its attaching")
    agent.control.remove("default/b")
    gate.touch()
    thread.join()
    assert failed
    eventually(lambda: len(list(agent.node.store.glob("*.weights"))) == 1, "the removal of its weights")
    assert attached(agent) == {100: 1}


def test_weights_that_cannot_be_pinned_are_swapped_all_the_same_and_said_once(gpus: Callable[..., Gpus]) -> None:
    agent = gpus()
    agent.control.declare(*(function(f"f{number}", f"add?value={number}&fault=unpinned", share=WHOLE) for number in range(3)))
    agent.control.declare(function("a", "add?value=5", share=WHOLE))
    eventually(lambda: attached(agent) == {100: 4}, "the attaching of all")
    assert all(agent.answers(f"default/f{number}", number) for number in range(3))
    assert isinstance(agent.predictor.outcome(agent.predictor.submit("default/a", ROWS)), Answer)
    (lane,) = agent.control.status().devices[0].lanes
    assert (lane.attached, lane.unpinned) == (4, 3)
    assert agent.node.read_log().count("cannot be pinned") == 1
