"""The fidelity benchmark: what single requests say is found again, and a run leaves files that can be simulated against each other."""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks.open_loop import Reply, Request, play, serving
from benchmarks.simulator_parts import fidelity
from contracts.functions import Function, ModelFormat, ModelRef, Share
from models.samples import sample_inputs
from profiler.device import DeviceFacts
from profiler.measure import Sampling
from profiler.points import Header, Point, Points
from sluice.cli import main


def point(name: str, gpu_ms: float, device_bytes: int) -> Point:
    service = {f"service_{part}_ms": gpu_ms + 1 for part in ("mean", "p50", "p95", "p99")}
    latency = {f"latency_{part}_ms": gpu_ms + 1 for part in ("mean", "p50", "p95", "p99")}
    return Point(
        function=f"default/{name}",
        model_format="sluice-catalog",
        model_source="mlp",
        model_digest="d",
        program_id="p",
        device="cpu:0",
        batch=1,
        sm_percent=100,
        quota_percent=100,
        samples=100,
        gpu_ms=gpu_ms,
        swap_ms=1,
        device_bytes=device_bytes,
        duration_s=1,
        started_at=datetime(2026, 1, 2, tzinfo=UTC),
        beside_load=False,
        seed=1,
        **service,
        **latency,
    )


def single(run_ms: float, around_ms: float, swap_ms: float = 0.0) -> Reply:
    return Reply(run_ms + around_ms + swap_ms, 0.0, swap_ms, run_ms, swap_ms > 0, 1)


def test_what_single_requests_say_is_found_again() -> None:
    """A run in its place takes 1.2 times as long, a cold one half as long again; of that, a tenth is left when the weights are there."""
    facts = DeviceFacts("cpu", "a processor", 1, 2500.0, 1e11, 2e10, 1e10, 1 << 30)
    points = Points(Header({"cpu:0": facts}, {}), (point("large", 20.0, 100_000_000), point("small", 5.0, 1_000)))
    copy_ms, cold_ms = 100.0, 36.0
    chance = np.random.default_rng(1)
    replies: Mapping[str, list[Reply]] = {
        "large": [single(24 * factor, 3.0) for factor in chance.normal(1, 0.02, 40)]
        + [single(cold_ms, 5.0, copy_ms + 0.1 * cold_ms - cold_ms) for _ in range(9)],
        "small": [single(6 * factor, 2.0) for factor in chance.normal(1, 0.02, 40)],
    }
    found = fidelity._Calibration.of(points, replies, 0.5)
    assert found.scale == pytest.approx({"large": 1.2, "small": 1.2}, rel=0.02)
    assert found.run_ms == pytest.approx({"large": 24.0, "small": 6.0}, rel=0.02)
    assert found.around_ms == pytest.approx({"large": 2.5, "small": 1.5}), "of it, half a millisecond is the lane's"
    assert found.cold == pytest.approx(1.5, rel=0.02)
    assert found.tail == pytest.approx(0.1, abs=0.01)


def test_without_cold_requests_nothing_is_slower_for_being_cold() -> None:
    facts = DeviceFacts("cpu", "a processor", 1, 2500.0, 1e11, 2e10, 1e10, 1 << 30)
    points = Points(Header({"cpu:0": facts}, {}), (point("small", 5.0, 1_000),))
    found = fidelity._Calibration.of(points, {"small": [single(5.0, 1.0)] * 3}, 0.0)
    assert (found.cold, found.scale["small"]) == (1.0, pytest.approx(1.0))
    assert fidelity._Calibration.of(points, {"small": [single(5.0, 1.0, swap_ms=1.0)]}, 0.0).run_ms == {"small": 5.0}, "none was warm"


def test_the_drift_is_between_the_slowest_and_the_fastest_round() -> None:
    rounds = [{"a": [single(10 * slower, 1)] * 3, "b": [single(4 * slower, 1), single(50, 1, swap_ms=9)]} for slower in (1.0, 0.8, 1.2)]
    assert fidelity._drift(rounds) == pytest.approx(0.5)


def test_an_open_loop_load_on_a_real_node() -> None:
    """Of two functions, in the order in which they were due; the parts of each latency add up."""
    functions = [
        Function(name, ModelRef(ModelFormat.CATALOG, source), share=Share.of(100, 20)) for name, source in (("one", "mlp"), ("two", "cnn?size=32"))
    ]
    requests = [Request.of(function, {key: array[:1] for key, array in sample_inputs(function.model, 2, 1).items()}) for function in functions]
    with serving(functions, "--device-memory", "64Mi", "--host-memory", "64Mi") as node:
        replies = play(node, [(0.01 * number, requests[number % 2]) for number in range(40)])
        lost = play(node, [(0.0, Request("three", requests[0].body, requests[0].head))])
    assert lost == [None], "there is no such function"
    answered = [reply for reply in replies if reply is not None]
    assert len(answered) == 40
    assert all(reply.run_ms > 0 and reply.around_ms > 0 and reply.rows >= 1 for reply in answered)
    assert any(reply.cold for reply in answered)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_run_leaves_files_that_can_be_simulated_against_each_other(tmp_path: Path) -> None:
    size = fidelity._Size(span_s=5, warm_up_s=1, parts=2, singles=4, handover_s=0.5, sampling=Sampling(spread=0.1, seconds=0.1, most_seconds=0.2))
    metrics = fidelity._run(tmp_path, size)
    assert metrics["fidelity_failed"].value == 0
    assert metrics["fidelity_requests"].value > 10
    command = ["simulate", str(tmp_path / "scenario.yaml"), "--against", str(tmp_path / "real.json"), "--json"]
    told = CliRunner().invoke(main, command, catch_exceptions=False)
    lines = {line["figure"]: line for line in json.loads(told.stdout.splitlines()[-1])["against"]}
    assert abs(lines["GPU seconds"]["error_percent"]) == pytest.approx(metrics["fidelity_gpu_seconds_error"].value)
