"""A whole node under load over HTTP: kill -9 of each of its processes. Each request gets one response, and it serves again without a hand."""

from __future__ import annotations

import signal
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.faults import census
from tests.faults.real import function, source, until
from tests.faults.whole import Load, Whole
from tests.nodeagent.node import Control

MODELS = {f"f{seed}": source(seed, width=256, depth=3) for seed in range(4)}
"""Four of about 0.5 MiB each on a device of 1.25 MiB."""
MODELS["twin"] = MODELS["f0"]
REFUSALS = {"429", "503", "504"}


@pytest.fixture(scope="module")
def node() -> Iterator[Whole]:
    """One node for this file, warmed up and settled. The last tests end it."""
    with tempfile.TemporaryDirectory(prefix="sluice-faults-", dir="/tmp") as folder:
        node = Whole(Path(folder), MODELS)
        try:
            warm = Load(node.url, MODELS)
            warm.serves_all()
            assert set(warm.stop()) == {"200"}
            node.settle()
            yield node
        finally:
            node.kill()


def _counts(outcomes: Counter[str]) -> str:
    return ", ".join(f"{outcome}: {count}" for outcome, count in sorted(outcomes.items()))


@pytest.mark.parametrize("role", ["lane", "fork server", "agent"])
def test_kill_9_under_load_loses_no_request(role: str, node: Whole) -> None:
    """No client sees its connection end: the predictor answers for what it accepted."""
    load = Load(node.url, MODELS)
    for _ in range(2):
        load.serves_all()
        _kill(census.of_role(node.mark, role))
        load.serves_all()
    outcomes = load.stop()
    assert set(outcomes) <= {"200"} | REFUSALS, _counts(outcomes)
    until(lambda: census.of_role(node.mark, "lane"), "a lane")
    _warm(node)
    node.leaks_nothing()


def _kill(processes: list[psutil.Process]) -> None:
    """All of them, and waits until they have gone."""
    census.kill(processes)
    until(lambda: not any(map(census.alive, processes)), "their end")


def _warm(node: Whole) -> None:
    load = Load(node.url, MODELS)
    load.serves_all()
    load.stop()


def test_kill_9_of_the_predictor_ends_its_connections_and_no_more(node: Whole) -> None:
    load = Load(node.url, MODELS)
    load.serves_all()
    _kill([node.one("predictor")])
    load.serves_all()
    outcomes = load.stop()
    assert outcomes["lost"] >= 1
    assert set(outcomes) <= {"200", "404", "lost"} | REFUSALS, _counts(outcomes)
    _warm(node)
    node.leaks_nothing()


def test_kill_9_of_everything_but_the_supervisor(node: Whole) -> None:
    load = Load(node.url, MODELS)
    load.serves_all()
    census.kill([process for process in census.family(node.mark) if census.role(process) != "supervisor"])
    load.serves_all()
    outcomes = load.stop()
    assert set(outcomes) <= {"200", "404", "lost"} | REFUSALS, _counts(outcomes)
    _warm(node)
    until(lambda: not census.of_role(node.mark, "loader"), "the end of the loader")
    node.leaks_nothing()


def test_a_function_that_is_removed_under_load_is_not_found_and_comes_back(node: Whole) -> None:
    """Its weights stay in the store meanwhile, because its twin has the same."""
    load = Load(node.url, MODELS)
    load.serves_all()
    control = Control(node.run_dir)
    control.remove("default/f0")
    until(lambda: load.outcomes["404"] > 3, "refusals")
    others = load.served["f1"]
    until(lambda: load.served["f1"] > others + 3, "answers of the others")
    control.declare(function("f0", MODELS["f0"], max_batch=1))
    control.channel.close()
    load.serves_all()
    outcomes = load.stop()
    assert set(outcomes) <= {"200", "404"} | REFUSALS, _counts(outcomes)
    node.leaks_nothing()


def test_sigterm_under_load_answers_what_was_accepted_and_leaves_nothing(node: Whole) -> None:
    load = Load(node.url, MODELS)
    load.serves_all()
    node.process.send_signal(signal.SIGTERM)
    until(lambda: load.outcomes.total() - load.outcomes["200"] > 0, "the first refusal")
    node.end()
    outcomes = load.stop()
    assert set(outcomes) <= {"200", "lost"} | REFUSALS, _counts(outcomes)
    assert not node.run_dir.exists()
    assert not node.store.exists()


def test_kill_9_of_the_supervisor_ends_all_and_the_next_adopts_what_was_loaded() -> None:
    with tempfile.TemporaryDirectory(prefix="sluice-faults-", dir="/tmp") as folder:
        first = Whole(Path(folder), MODELS)
        try:
            load = Load(first.url, MODELS)
            load.serves_all()
            inodes = {path.name: path.stat().st_ino for path in first.store.iterdir()}
            first.process.kill()
            first.process.wait()
            until(lambda: not census.family(first.mark), lambda: f"its processes outlive it: {census.family(first.mark)}")
            outcomes = load.stop()
            assert set(outcomes) <= {"200", "lost"} | REFUSALS, _counts(outcomes)

            second = Whole(Path(folder), MODELS)
            assert {path.name: path.stat().st_ino for path in second.store.iterdir()} == inodes
            load = Load(second.url, MODELS)
            load.serves_all()
            assert set(load.stop()) == {"200"}
            assert second.end() in (0, 130)
            assert not second.store.exists()
            assert not second.run_dir.exists()
        finally:
            first.kill()


@pytest.mark.slow
def test_kill_9_of_isolated_predictors_under_load_is_answered_by_the_router() -> None:
    """The router holds the connections, so that no client loses one."""
    models = {name: MODELS[name] for name in ("f0", "f1")}
    with tempfile.TemporaryDirectory(prefix="sluice-faults-", dir="/tmp") as folder:
        node = Whole(Path(folder), models, "--isolate", "--idle-seconds", "600")
        try:
            load = Load(node.url, models, clients=2)
            load.serves_all()
            load.stop()
            node.settle()
            load = Load(node.url, models, clients=2)
            for role in ("predictor", "agent", "lane"):
                load.serves_all()
                _kill(census.of_role(node.mark, role))
                load.serves_all()
            outcomes = load.stop()
            assert set(outcomes) <= {"200", "502"} | REFUSALS, _counts(outcomes)
            node.leaks_nothing()
            node.end()
            assert not node.store.exists()
        finally:
            node.kill()
