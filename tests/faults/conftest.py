"""Real agents, each on a run dir of its own, and nothing left of them afterwards."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults import census
from tests.faults.real import Agent, until


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder whose path leaves room for a socket's name."""
    with tempfile.TemporaryDirectory(prefix="sluice-faults-", dir="/tmp") as path:
        yield Path(path)


@pytest.fixture
def start(folder: Path) -> Iterator[Callable[..., Agent]]:
    """Starts agents on one run dir."""
    agents: list[Agent] = []

    def start(*arguments: str, **settings: object) -> Agent:
        agents.append(Agent(folder, *arguments, **settings))  # type: ignore[arg-type]
        return agents[-1]

    yield start
    for agent in agents:
        agent.end()
    until(lambda: not census.family(str(folder)), lambda: f"left behind: {census.family(str(folder))}")
