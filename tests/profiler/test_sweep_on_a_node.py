"""Sweeps through a real agent and real lanes: what a kill leaves, what the share does to the latency, pairs side by side, and what is refused."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from contracts.errors import InvalidArtifact, InvalidTensor, InvalidValue, Unavailable
from contracts.functions import Function, ModelFormat, ModelRef, Share
from contracts.units import MIB
from models.describe import describe
from models.samples import sample_inputs
from profiler import pairs
from profiler.device import DeviceFacts
from profiler.features import Features, Work
from profiler.measure import Sampling
from profiler.points import Config, Point, read
from profiler.session import NodeOptions, Session, started
from profiler.sweep import Plan, sweep

ROOT = Path(__file__).parents[2]
WITHIN_S = 120.0
FACTS = DeviceFacts("cpu", "a processor", 1, 0.0, 1e11, 1e10, 1e10, 1 << 26)
NODE = NodeOptions(device_bytes=64 * MIB, host_bytes=256 * MIB)
ONE = Function("one", ModelRef(ModelFormat.CATALOG, "mlp?width=1024&depth=4"))
TWO = Function("two", ModelRef(ModelFormat.CATALOG, "mlp?width=256&depth=8"))
PLAN = Plan((1, 64), (50, 100), (10, 100), None, None, True, sampling=Sampling(1.0, 5, 5, seconds=0.1, most_seconds=60), visits=2)
SWEEP = """
import sys
from pathlib import Path
from profiler.sweep import sweep
from tests.profiler.test_sweep_on_a_node import FACTS, NODE, ONE, PLAN, InOrder
import profiler.device
profiler.device.measure = lambda *_: FACTS
sweep([ONE], Path(sys.argv[1]), lambda *_: InOrder(), PLAN, NODE, lambda progress: print(progress.measured, flush=True))
"""


class InOrder:
    """Plans nothing."""

    def next(self, measured: object, candidates: object) -> tuple[int, float]:
        return 0, 1.0


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + WITHIN_S
    while not condition():
        assert time.monotonic() < deadline, f"not within {WITHIN_S:g} s: {what}"
        time.sleep(0.05)


def stores() -> set[str]:
    return {entry for entry in os.listdir("/dev/shm") if entry.startswith("sluice-profile-")}


@pytest.fixture(autouse=True)
def _facts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("profiler.device.measure", lambda *_: FACTS)


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    with started(NODE) as found:
        yield found


@pytest.fixture
def folder() -> Iterator[str]:
    """Short enough for a socket's path; what a killed sweep leaves in it goes with the test."""
    with tempfile.TemporaryDirectory(prefix="sluice-", dir="/tmp") as found:
        yield found


def test_a_killed_sweep_loses_nothing_leaves_no_process_and_goes_on(tmp_path: Path, folder: str, session: Session) -> None:
    path, before = tmp_path / "t.parquet", stores()
    environment = {**os.environ, "TMPDIR": folder}
    process = subprocess.Popen([sys.executable, "-c", SWEEP, str(path)], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        while process.stdout.readline().strip() != "2":
            assert process.poll() is None
        family = psutil.Process(process.pid).children(recursive=True)
        assert family, "an agent and its lanes"
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    until(lambda: not any(each.is_running() and each.status() != psutil.STATUS_ZOMBIE for each in family), "the agent ends")
    until(lambda: stores() <= before, "its weights leave the memory")
    kept = read(path).points
    assert len(kept) >= 2
    (outcome,) = sweep([ONE], path, lambda *_: InOrder(), PLAN, session)
    assert (outcome.reason, outcome.measured) == ("grid", 8)
    found = read(path).points
    assert found[: len(kept)] == kept
    check_the_law({point.config: point for point in found})


def check_the_law(found: dict[Config, Point]) -> None:
    """What holds however slow the machine is. Only a batch that is long beside this process's own delays meets the quota for all of its time."""
    for point in found.values():
        assert point.samples >= 5
        assert point.latency_p50_ms <= point.latency_p95_ms <= point.latency_p99_ms
        assert point.gpu_ms < point.service_mean_ms <= point.latency_mean_ms
        assert point.swap_ms >= 0
    longest = found[Config(64, 50, 10)]
    assert longest.latency_mean_ms > 0.7 * longest.gpu_ms * 100 / 10, "the limit binds: a batch every gpu time / quota"
    assert longest.latency_mean_ms > 2 * longest.service_mean_ms, "nearly all of it is the wait for the quota"


def test_a_pair_is_measured_side_by_side_in_every_split(session: Session) -> None:
    graph = Features({"matmul": Work(kernels=1, row_flops=1e6, fixed_bytes=1e6)}, 1)
    model = pairs.measure([ONE, TWO], session, seconds=0.2, beside_load=True, features=lambda *_: graph)
    assert [(pair.function, pair.neighbour, pair.sm_percent, pair.neighbour_sm_percent) for pair in model.pairs] == [
        ("default/one", "default/two", 50, 50),
        ("default/two", "default/one", 50, 50),
        ("default/one", "default/two", 25, 75),
        ("default/two", "default/one", 75, 25),
        ("default/one", "default/two", 75, 25),
        ("default/two", "default/one", 25, 75),
    ]
    slower, faster = model.pairs[2].demand, model.pairs[4].demand
    assert slower.memory < faster.memory, "a smaller share takes less of the device"
    assert model.slowdown(slower, faster) >= 1
    assert not session.status().functions, "both are gone from the node"


def test_one_function_is_no_pair(session: Session) -> None:
    with pytest.raises(InvalidValue, match="two functions or more"):
        pairs.measure([ONE], session)


def test_inputs_that_do_not_fit_are_named(session: Session) -> None:
    signature = describe(ONE.model).signature
    with session.serving(ONE, Share.of(100, 50)) as key, pytest.raises(InvalidTensor, match="shape must fit"):
        session.caller(key, signature, sample_inputs(TWO.model, 1, 1) | {"features": sample_inputs(ONE.model, 1, 1)["features"][:, :5]})


def test_a_model_that_cannot_be_loaded_is_an_error_of_its_own_and_the_node_lives_on(tmp_path: Path, session: Session) -> None:
    (tmp_path / "torn.pt2").write_bytes(b"PK\x03\x04 torn")
    torn = Function("torn", ModelRef(ModelFormat.TORCH_EXPORT, f"file://{tmp_path}/torn.pt2"))
    with pytest.raises(InvalidArtifact, match=r"torn\.pt2"):
        sweep([torn], tmp_path / "t.parquet", lambda *_: InOrder(), PLAN, session)
    assert not list(tmp_path.glob("t.parquet*"))
    assert not session.status().functions


def test_a_device_that_there_is_not_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    with pytest.raises(InvalidValue, match="must be cpu:N, got 'tpu:0'"):
        sweep([ONE], tmp_path / "t.parquet", lambda *_: InOrder(), PLAN, NodeOptions(device="tpu:0", device_bytes=MIB, host_bytes=MIB))


def test_no_node_and_an_agent_that_cannot_start_are_said(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="no node runs at"):
        Session(tmp_path, None)
    with pytest.raises(Unavailable, match=r"the node agent ended with code 2: .*must look like cpu:0"), started(NodeOptions(device="nonsense")):
        pass
