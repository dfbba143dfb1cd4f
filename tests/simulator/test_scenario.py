"""Scenario files: what is wrong is named with its key; what is right gives the same world for the same seed, and every policy plays it."""

import os
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import yaml

from contracts.errors import InvalidValue, SluiceError
from contracts.functions import FunctionClass
from contracts.units import MS, S
from simulator import report
from simulator.run import POLICIES, simulate
from simulator.scenario import build, load

SCENARIOS = Path(__file__).parents[2] / "benchmarks" / "scenarios"
DATA = Path(os.environ.get("SLUICE_DATA", Path(__file__).parents[3] / "shared" / "data"))
SMALL: dict[str, Any] = {
    "name": "small",
    "span_s": 60,
    "warm_up_s": 5,
    "devices": {"count": 2, "memory": "1Gi", "dollars_per_hour": 3.6},
    "policies": list(POLICIES),
    "pod_start_s": 2,
    "functions": [
        {"name": "vision", "count": 6, "weights": "300Mi", "time": {"row_ms": 5}, "load": {"per_minute": [20, 60]}, "slo_ms": 100, "load_ms": 500},
        {"name": "batch", "class": "best-effort", "weights": "100Mi", "time": {"fixed_ms": 20}, "load": {"per_minute": 30, "pattern": "bursty"}},
    ],
}


def written(document: object, folder: Path) -> Path:
    path = folder / "scenario.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def changed(**parts: object) -> dict[str, Any]:
    return {**SMALL, **parts}


def with_group(**parts: object) -> dict[str, Any]:
    return changed(functions=[{**SMALL["functions"][0], **parts}])


@pytest.mark.parametrize("path", sorted(SCENARIOS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_scenarios_of_the_benchmarks_are_right(path: Path) -> None:
    scenario = load(path)
    if any(group.load.trace or group.time.table for group in scenario.functions) and not DATA.is_dir():
        pytest.skip("the data is not here (SLUICE_DATA)")
    assert len(build(scenario, 0).arrivals)


@pytest.mark.parametrize(
    ("document", "named"),
    [
        (changed(spam=1), "spam"),
        (changed(hardware={"spam": 1}), "spam"),
        (changed(kpa={"spam": 1}), "spam"),
        (changed(kpa={"target": 0}), r"kpa\.target"),
        (changed(hardware={"tail": 2}), r"hardware\.tail"),
        (changed(span_s=0), r"span_s"),
        (changed(functions=[]), "functions"),
        (changed(policies=[]), "policies"),
        (changed(devices={"count": 0}), r"devices\.count"),
        (changed(devices={"memory": "many"}), r"devices\.memory.*many"),
        (with_group(slo_ms=-1), r"functions\[0\]\.slo_ms"),
        (with_group(**{"class": "urgent"}), "urgent"),
        (with_group(load={}), r"functions\.vision\.load"),
        (with_group(load={"per_minute": [1, 2, 3]}), "per_minute"),
        (with_group(load={"per_minute": 5, "pattern": "odd"}), r"functions\.vision\.load\.pattern.*odd"),
        (with_group(load={"trace": "gone.csv"}), r"gone\.csv"),
        (with_group(time={}), r"functions\.vision\.time"),
        (with_group(time={"table": "gone.csv"}), r"gone\.csv"),
        (with_group(time={"fixed_ms": 1, "table": "gone.csv"}), r"functions\.vision\.time.*law and table"),
        (with_group(time={"profile": "gone.parquet"}), r"functions\.vision\.time\.profile.*gone\.parquet"),
        (with_group(time={"fixed_ms": 1, "estimator": "e.npz"}), r"functions\.vision\.time: .*e\.npz"),
        (with_group(time={"fixed_ms": 1, "scale": 0}), r"functions\[0\]\.time\.scale"),
        (with_group(around_ms=-1), r"functions\[0\]\.around_ms"),
        (changed(interference="gone.json"), r"interference.*gone\.json"),
        (with_group(weights="heavy"), r"functions\.vision\.weights.*heavy"),
        (with_group(name="Not A Label"), "Not A Label"),
        ([1, 2], "object"),
        ("{", "scenario"),
    ],
)
def test_what_is_wrong_is_named(document: object, named: str, tmp_path: Path) -> None:
    path = written(document, tmp_path)
    if document == "{":
        path.write_text("{")
    with pytest.raises(SluiceError, match=named):
        build(load(path), 0)


def test_a_seed_is_a_world(tmp_path: Path) -> None:
    scenario = load(written(SMALL, tmp_path))
    first, again, other = (build(scenario, seed) for seed in (0, 0, 1))
    assert first.arrivals.at_ns.tolist() == again.arrivals.at_ns.tolist() != other.arrivals.at_ns.tolist()
    assert [function.name for function in first.functions] == [*(f"vision-{n}" for n in range(6)), "batch"]
    assert first.functions[-1].cls is FunctionClass.BEST_EFFORT
    assert first.functions[0].slo.latency_ns == 100 * MS
    counts = np.bincount(first.arrivals.function, minlength=7) * 60 * S / first.arrivals.span_ns
    assert (counts[:6] > 10).all()
    assert (counts[:6] < 80).all()


def test_a_trace_is_found_beside_the_file(tmp_path: Path) -> None:
    (tmp_path / "calls.csv").write_text("arrival_s,model\n" + "".join(f"{n / 2},m{n % 4}\n" for n in range(400)))
    world = build(load(written(with_group(count=3, load={"trace": "calls.csv", "from_s": 10, "rate": 2.0}), tmp_path)), 0)
    assert len(world.arrivals) == pytest.approx(65 * 2 * 2 * 3 / 4, rel=0.1)
    assert world.arrivals.span_ns == 65 * S


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_accounts_for_every_request(policy: str, tmp_path: Path) -> None:
    scenario = msgspec.structs.replace(load(written(SMALL, tmp_path)), warm_up_s=0.0)
    world = build(scenario, 3)
    heard: list[int] = []
    outcome = simulate(policy, world, heard.append)
    assert heard[-1] == len(world.arrivals)
    assert [record.requests for record in outcome.records.values()] == np.bincount(world.arrivals.function, minlength=7).tolist()
    found = report.figures(world, outcome)
    assert found["requests"] == len(world.arrivals)
    assert 0 < found["gpu_seconds_busy"] <= found["gpu_seconds_reserved"] <= found["gpu_seconds_whole"] <= scenario.devices.total * (60 + 30)
    assert found["dollars"] == pytest.approx(found["gpu_seconds_reserved"] / 1000)
    assert found["total_p50_ms"] <= found["total_p99_ms"]


def test_what_lies_around_a_run_may_differ_by_group(tmp_path: Path) -> None:
    groups = [{**group, "load": {"per_minute": 60}} for group in SMALL["functions"]]
    groups[1]["around_ms"] = 40
    world = build(load(written(changed(around_ms=3, functions=groups), tmp_path)), 0)
    assert world.around_ns == (3 * MS,) * 6 + (40 * MS,)
    records = simulate("sluice", world).records
    assert (
        min(ms for ms, _ in records["default/batch"].parts["total"].curve())
        > 60
        > min(ms for ms, _ in records["default/vision-0"].parts["total"].curve())
    )


def test_the_warm_up_is_not_counted(tmp_path: Path) -> None:
    world = build(load(written(SMALL, tmp_path)), 3)
    outcome = simulate("sluice", world)
    counted = sum(record.requests for record in outcome.records.values())
    assert counted == pytest.approx((world.arrivals.at_ns >= 5 * S).sum(), abs=3)


def test_a_policy_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidValue, match=r"policies.*magic"):
        simulate("magic", build(load(written(SMALL, tmp_path)), 0))
