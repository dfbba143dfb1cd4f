"""A real agent, a well-behaved predictor that works beside every test and must see only right answers, and what the agent holds at the end."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from contracts.wire import Answer
from tests.faults.real import Agent, Predictor, function, rows_of, source, until
from tests.nodeagent.node import Control

MINE, OTHERS = source(1), source(2)
GROWTH_BYTES = 160 << 20
"""What one frame of a million parts and 32 MiB of unread answers leave on the heap, though both are freed. A test that repeats bounds more."""


class Healthy(threading.Thread):
    """Sends batch after batch until it is stopped. `served` counts right answers; `error` is the first thing that went wrong."""

    def __init__(self, predictor: Predictor) -> None:
        super().__init__(daemon=True)
        self._predictor = predictor
        self._stopping = threading.Event()
        self.served = 0
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            while not self._stopping.is_set():
                batch = self._predictor.submit("default/mine", rows_of(self.served), rows_of(self.served + 1, 2))
                assert isinstance(self._predictor.outcome(batch), Answer), self._predictor.outcome(batch)
                assert self._predictor.check(batch, MINE)
                self.served += 1
        except BaseException as error:
            self.error = error

    def stop(self) -> None:
        self._stopping.set()
        self.join()


class Scene:
    """`agent`, its `control`, and the healthy predictor."""

    def __init__(self, agent: Agent, control: Control) -> None:
        self.agent = agent
        self.control = control
        self.healthy = Healthy(Predictor(agent.run_dir))
        self.path = str(agent.run_dir / "agent.sock")

    def undisturbed(self) -> None:
        """The same agent has served the healthy predictor again since, and rightly."""
        seen = self.healthy.served
        until(lambda: self.healthy.served > seen + 1 or self.healthy.error is not None, "an answer for the healthy predictor")
        assert self.healthy.error is None, f"{self.healthy.error!r}\n{self.agent.log.read_text()}"
        assert self.agent.process.poll() is None


@pytest.fixture(scope="module")
def scene() -> Iterator[Scene]:
    """Functions `mine` (granted) and `others` (not); at the end no process, descriptor, segment or much memory more than at the beginning."""
    with tempfile.TemporaryDirectory(prefix="sluice-hostile-", dir="/tmp") as folder:
        agent = Agent(Path(folder))
        try:
            control = Control(agent.run_dir)
            control.declare(function("mine", MINE), function("others", OTHERS))
            control.grant("default/mine", "default/ghost")
            warm = Predictor(agent.run_dir)
            until(lambda: warm.serves("default/mine", MINE), "the first answer")
            warm.close()
            scene = Scene(agent, control)
            scene.undisturbed()
            agent.settle(functions=2)
            held = psutil.Process(agent.process.pid).memory_info().rss
            yield scene
            scene.undisturbed()
            agent.leaks_nothing()
            grown = psutil.Process(agent.process.pid).memory_info().rss - held
            assert grown < GROWTH_BYTES, f"the agent has grown by {grown} bytes"
            scene.healthy.stop()
        finally:
            agent.end()
