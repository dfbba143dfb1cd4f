"""kill -9 of every process under the agent, with real models swapped under load: each accepted batch is answered once, rightly, and nothing leaks."""

from __future__ import annotations

import signal
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from contracts.errors import SluiceError, Unavailable
from contracts.functions import FunctionClass
from contracts.wire import Answer, Failed
from tests.faults import census
from tests.faults.real import Agent, Predictor, connected, function, rows_of, source, until
from tests.nodeagent.node import Control

MODELS = {f"default/f{seed}": source(seed, width=256, depth=3) for seed in range(4)}
"""Four of about 0.5 MiB each, on a device of 1.25 MiB: every other batch swaps."""


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[Agent, Control, Predictor]]:
    """One agent for this file: latency-sensitive and best-effort functions that do not fit together, warmed up."""
    with tempfile.TemporaryDirectory(prefix="sluice-faults-", dir="/tmp") as folder:
        agent = Agent(Path(folder), memory="1280Ki")
        try:
            with connected(agent) as (control, predictor):
                for number, (key, model) in enumerate(MODELS.items()):
                    cls = FunctionClass.BEST_EFFORT if number % 2 else FunctionClass.LATENCY_SENSITIVE
                    control.declare(function(key.removeprefix("default/"), model, cls=cls))
                for key, model in MODELS.items():
                    until(lambda key=key, model=model: predictor.serves(key, model), f"the first answer of {key}")
                agent.settle(functions=len(MODELS))
                yield agent, control, predictor
        finally:
            agent.end()


def load(predictor: Predictor, count: int) -> list[tuple[str, int]]:
    """Submits `count` batches over all functions; (key, id) of each, kept by the predictor."""
    keys = list(MODELS)
    batches = []
    for number in range(count):
        key = keys[number % len(keys)]
        batches.append((key, predictor.submit(key, *(rows_of(number * 10 + part, 1 + part % 3) for part in range(1 + number % 3)))))
    return batches  # type: ignore[return-value]


def check(predictor: Predictor, batches: list) -> int:  # type: ignore[type-arg]
    """Every batch has exactly one outcome; answers are right, failures are of a lost lane. Returns how many were answered."""
    answered = sum(predictor.check(batch, MODELS[key]) for key, batch in batches)
    for _, batch in batches:
        outcome = predictor.outcomes[batch.id]
        assert isinstance(outcome, Answer) or outcome.kind == "Unavailable", outcome
    return answered


def serve_again(predictor: Predictor) -> None:
    for key, model in MODELS.items():
        until(lambda key=key, model=model: predictor.serves(key, model), f"an answer of {key}")


def test_kill_9_of_lanes_under_load(served: tuple[Agent, Control, Predictor]) -> None:
    agent, _, predictor = served
    for round_ in range(3):
        batches = load(predictor, 60)
        predictor.outcome(batches[5 + round_][1])
        census.kill(agent.processes("lane"))
        assert check(predictor, batches) >= 60 - 4, "a lane holds one batch, and a lost one is tried again"
        serve_again(predictor)
    agent.leaks_nothing()


def test_a_lane_killed_again_and_again_never_answers_twice(served: tuple[Agent, Control, Predictor]) -> None:
    agent, _, predictor = served
    batches = load(predictor, 200)
    for number in range(10, 200, 40):
        predictor.outcome(batches[number][1])
        census.kill(agent.processes("lane"))
    check(predictor, batches)
    serve_again(predictor)
    agent.leaks_nothing()


def test_a_stopped_lane_is_replaced_when_it_is_killed(served: tuple[Agent, Control, Predictor]) -> None:
    agent, _, predictor = served
    batches = load(predictor, 40)
    lanes = agent.processes("lane")
    for lane in lanes:
        lane.suspend()
    census.kill(lanes)
    check(predictor, batches)
    serve_again(predictor)
    agent.leaks_nothing()


def test_kill_9_of_the_fork_server_under_load(served: tuple[Agent, Control, Predictor]) -> None:
    agent, _, predictor = served
    batches = load(predictor, 100)
    predictor.outcome(batches[5][1])
    (server,) = agent.processes("fork server")
    server.kill()
    assert check(predictor, batches) == 100, "its lanes live on"
    until(lambda: [each.pid for each in agent.processes("fork server")] not in ([], [server.pid]), "the next fork server")
    serve_again(predictor)
    agent.leaks_nothing()


def test_kill_9_of_the_fork_server_and_of_all_lanes_under_load(served: tuple[Agent, Control, Predictor]) -> None:
    agent, _, predictor = served
    batches = load(predictor, 100)
    predictor.outcome(batches[5][1])
    census.kill([*agent.processes("fork server"), *agent.processes("lane")])
    check(predictor, batches)
    serve_again(predictor)
    agent.leaks_nothing()


class Declaring(threading.Thread):
    """A Declare that waits for its reply in a thread; `error` is what it got."""

    def __init__(self, agent: Agent, name: str, model: str) -> None:
        super().__init__(daemon=True)
        self._declared = function(name, model)
        self._control = Control(agent.run_dir)
        self.error: SluiceError | None = None
        self.start()

    def run(self) -> None:
        try:
            self._control.declare(self._declared)
        except SluiceError as error:
            self.error = error
        finally:
            self._control.channel.close()

    def outcome(self) -> SluiceError | None:
        self.join(120)
        assert not self.is_alive(), "the Declare got no reply"
        return self.error


def test_a_client_that_leaves_in_the_middle_leaves_nothing(served: tuple[Agent, Control, Predictor]) -> None:
    agent, _, predictor = served
    for _ in range(3):
        leaving = Predictor(agent.run_dir)
        batches = load(predictor, 40)
        load(leaving, 40)
        leaving.close()
        assert check(predictor, batches) == 40
    agent.leaks_nothing()


def test_kill_9_of_a_loader_that_stands_still(served: tuple[Agent, Control, Predictor]) -> None:
    agent, control, _ = served
    control.declare(function("first", source(21)))
    (loader,) = agent.processes("loader")
    loader.suspend()
    declaring = [Declaring(agent, f"next-{number}", source(30 + number)) for number in range(3)]
    until(lambda: sum(each.state == "loading" for each in control.status().functions) == 3, "the three declarations")
    loader.kill()
    assert sorted(type(each.outcome()).__name__ for each in declaring) == ["NoneType", "NoneType", "Unavailable"], "one was being read"
    for each in control.status().functions:
        if each.key not in MODELS:
            control.remove(each.key)


def test_kill_9_of_the_loader_while_it_writes(served: tuple[Agent, Control, Predictor]) -> None:
    agent, control, predictor = served
    large = source(9, width=512, depth=48)
    declaring = Declaring(agent, "large", large)
    until(lambda: list(agent.store.glob(".tmp-*")), "the writing of the weights")
    (loader,) = agent.processes("loader")
    loader.kill()
    error = declaring.outcome()
    assert isinstance(error, Unavailable)
    assert "died" in error.message
    batch = predictor.submit("default/large", rows_of(1))
    outcome = predictor.outcome(batch)
    assert isinstance(outcome, Failed)
    assert outcome.kind == "Unavailable"
    serve_again(predictor)

    control.declare(function("small", source(11)))
    assert predictor.serves("default/small", source(11))
    assert not list(agent.store.glob(".tmp-*"))
    control.remove("default/small")
    control.remove("default/large")
    agent.leaks_nothing()


def test_sigterm_under_load_answers_what_it_accepted(served: tuple[Agent, Control, Predictor]) -> None:
    """The last of this file: the agent ends."""
    agent, _, predictor = served
    batches = load(predictor, 100)
    predictor.outcome(batches[5][1])
    agent.process.send_signal(signal.SIGTERM)
    while predictor.receive():
        pass
    assert {batch.id for _, batch in batches} <= predictor.outcomes.keys()
    check(predictor, batches)
    assert agent.process.wait(120) == 0
    until(lambda: not agent.count().processes, "the end of its processes")
