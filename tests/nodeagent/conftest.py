"""Agents for the tests of the shell: each on a run dir of its own, and nothing left of it afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.census import alive
from tests.nodeagent.gpus import Gpus
from tests.nodeagent.node import Control, Node, Predictor, short_folder


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a short path."""
    with short_folder() as path:
        yield path


@pytest.fixture
def start(folder: Path) -> Iterator[Callable[..., Node]]:
    """Starts agents on one run dir; the last test's line ends them all."""
    nodes: list[Node] = []

    def start(*arguments: str, **settings: str) -> Node:
        nodes.append(Node(folder / "run", *arguments, **settings))
        return nodes[-1]

    yield start
    for node in nodes:
        node.remove()


@pytest.fixture
def node(start: Callable[..., Node]) -> Node:
    """A running agent of the fakes."""
    return start().ready()


@pytest.fixture
def control(node: Node) -> Iterator[Control]:
    """Its control connection; every function is granted to this process."""
    control = Control(node.run_dir)
    control.grant()
    yield control
    control.channel.close()


@pytest.fixture
def predictor(node: Node, control: Control) -> Iterator[Predictor]:
    """A predictor of this process that has been welcomed."""
    predictor = Predictor(node.run_dir)
    assert predictor.receive()
    yield predictor
    predictor.close()


@pytest.fixture
def gpus(start: Callable[..., Node]) -> Iterator[Callable[..., Gpus]]:
    """Starts an agent on fake GPUs; at the end nothing of it may be left."""
    started: list[Gpus] = []

    def start_gpus(*arguments: str, memory: str = "8Mi") -> Gpus:
        arguments = arguments if "--device" in arguments else ("--device", "cuda:0", *arguments)
        started.append(Gpus(start(*arguments, module="tests.fakes.gpu_agent", memory=memory)))
        return started[-1]

    yield start_gpus
    for each in started:
        if each.node.process.poll() is None:
            children = each.node.children()
            each.predictor.close()
            assert each.node.terminate() == 0, each.node.read_log()
            assert not [child for child in children if alive(child)], "orphans are left"
            assert not list(each.node.run_dir.glob("mps-*")), "a daemon's folder is left"
