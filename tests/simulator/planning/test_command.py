"""`sluice plan` as people and machines call it: from a trace, and from a Prometheus, with what goes wrong in one line."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from profiler.device import DeviceFacts
from profiler.points import Point, Table
from sluice.cli import main
from tests.simulator.planning.conftest import Samples

MINUTES = 20
CALLS = {"a": 6, "b": 12, "c": 3}


def plan(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["plan", *map(str, arguments), "--processes", "1", "--spell", "5m", "--spells", "1"])


def document(name: str, slo_ms: int = 500, replicas: int = 1) -> str:
    return f"""
apiVersion: serving.kserve.io/v1beta1
kind: InferenceService
metadata: {{name: {name}, namespace: team, annotations: {{sluice.dev/slo-latency-ms: "{slo_ms}"}}}}
spec: {{predictor: {{minReplicas: {replicas}, model: {{modelFormat: {{name: onnx}}, resources: {{limits: {{nvidia.com/gpu: "1"}}}}}}}}}}
"""


@pytest.fixture
def functions(tmp_path: Path) -> Path:
    path = tmp_path / "functions.yaml"
    path.write_text("---".join(document(name) for name in CALLS))
    return path


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "calls.csv"
    rows = [f"o,team,{name},http,{','.join([str(calls)] * MINUTES)}" for name, calls in CALLS.items()]
    path.write_text("\n".join([f"HashOwner,HashApp,HashFunction,Trigger,{','.join(map(str, range(1, MINUTES + 1)))}", *rows, ""]))
    return path


def test_help_shows_examples() -> None:
    found = CliRunner().invoke(main, ["plan", "--help"])
    assert found.exit_code == 0
    assert "Examples:\n    sluice plan" in found.output


def test_a_trace_as_a_table(functions: Path, trace: Path) -> None:
    found = plan(functions, "--trace", trace, "--run-ms", "20..30", "--weights", "200Mi", "--device-cost", "2.5/h")

    assert found.exit_code == 0, found.output
    assert "now: 3 devices" in found.output
    assert "with Sluice: 1 device (" in found.output
    assert "saved: 1,460 GPU hours a month, 3,650 dollars" in found.output
    assert "minReplicas" in found.output


def test_a_trace_as_json_and_as_plots(functions: Path, trace: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    found = plan(functions, "--trace", trace, "--run-ms", "b=40", "--run-ms", "20", "--weights", "200Mi", "--now", "2", "--json", "-o", output)
    told = json.loads(found.stdout)

    assert {path.name for path in output.iterdir()} == {"plan.json", "devices.png", "demand.png"}
    assert json.loads((output / "plan.json").read_text()) == told
    assert told["devices"] == {"now": 2, "plan": {"low": 1, "mean": 1, "high": 1}, "pool": {"low": 1, "mean": 1, "high": 1}}
    b = next(one for one in told["functions"] if one["function"] == "team/b")
    assert b["run_ms"] == {"low": 40, "mean": 40, "high": 40}
    assert b["requests_per_s"]["mean"] == pytest.approx(12 / 60, rel=0.01)
    assert b["simulated"]["high"]["kept"]
    assert (told["span_s"], told["simulated"]["length_s"]) == (MINUTES * 60, 300)
    assert told["saved_a_month"]["high"]["gpu_hours"] == pytest.approx(730)


def test_a_function_that_cannot_be_served_ends_with_3(functions: Path, trace: Path) -> None:
    found = plan(functions, "--trace", trace, "--run-ms", "a=2000", "--run-ms", "20", "--weights", "200Mi", "--json")
    assert found.exit_code == 3
    assert {one["function"]: one["verdict"] for one in json.loads(found.stdout)["functions"]}["team/a"] == "nothing will do"


def test_what_kubectl_writes_is_read(tmp_path: Path, trace: Path) -> None:
    listed = "apiVersion: v1\nkind: List\nitems:\n" + "".join(
        "- " + document(name).strip().replace("\n", "\n  ") + "\n  status: {ready: true}\n" for name in CALLS
    )
    (tmp_path / "list.yaml").write_text(listed)
    found = plan(tmp_path / "list.yaml", "--trace", trace, "--run-ms", "20", "--weights", "200Mi", "--json")
    assert [one["function"] for one in json.loads(found.stdout)["functions"]] == ["team/a", "team/b", "team/c"]


def test_run_times_and_weights_from_a_profile(functions: Path, trace: Path, tmp_path: Path) -> None:
    facts = DeviceFacts("gpu", "a GPU", 100, 1500.0, 1e13, 1e12, 1e10, 1 << 34)
    with Table(tmp_path / "points.parquet", "gpu:0", facts) as table:
        for batch in (1, 2, 8):
            for sm in (25, 50, 100):
                table.append(measured("default/a", batch, sm))
    given = (functions, "--trace", trace, "--profile", tmp_path / "points.parquet", "--json")
    found = plan(*given, "--run-ms", "b=20", "--run-ms", "c=20", "--weights", "b=1Gi", "--weights", "c=1Gi")

    a = json.loads(found.stdout)["functions"][0]
    assert (a["run_ms_from"], a["weight_bytes"]) == ("measurements", 300 << 20)
    assert a["run_ms"]["low"] <= a["run_ms"]["mean"] <= a["run_ms"]["high"]
    assert a["run_ms"]["mean"] == pytest.approx(12, rel=0.1)
    unknown = plan(*given, "--run-ms", "b=20", "--weights", "b=1Gi", "--weights", "c=1Gi")
    assert unknown.exit_code == 1
    assert "how long team/c runs is not known" in unknown.stderr
    assert "default/a" in unknown.stderr


def measured(function: str, batch: int, sm: int) -> Point:
    service = (10.0 + 2 * batch) * 100 / sm
    times = {f"{kind}_{part}_ms": service for kind in ("latency", "service") for part in ("mean", "p50", "p95", "p99")}
    fields: dict[str, Any] = {
        "function": function,
        "model_format": "sluice-catalog",
        "model_source": "mlp",
        "model_digest": "d" * 64,
        "program_id": "catalog:mlp:{}",
        "device": "gpu:0",
        "batch": batch,
        "sm_percent": sm,
        "quota_percent": 100.0,
        "samples": 100,
        "gpu_ms": service,
        "swap_ms": 1.0,
        "device_bytes": 300 << 20,
        "duration_s": 1.0,
        "started_at": datetime(2026, 1, 2, tzinfo=UTC),
        "beside_load": False,
        "seed": 1,
    }
    return Point(**times, **fields)


WRONG = {
    "no load": ((), 2, "--trace or --prometheus"),
    "two loads": (("--trace", "t", "--prometheus", "http://h"), 2, "--trace or --prometheus"),
    "latencies from nowhere": (("--trace", "t", "--latency-from-prometheus"), 2, "need --prometheus"),
    "a price that is none": (("--trace", "t", "--device-cost", "cheap"), 2, "'cheap'"),
    "a time that is none": (("--trace", "t", "--since", "soon"), 2, "'soon'"),
    "less than a step": (("--prometheus", "http://127.0.0.1:9", "--since", "30s"), 1, "--since, --step"),
    "a value twice": (("--trace", "t", "--run-ms", "5", "--run-ms", "6"), 2, "'6'"),
    "a trace that is not there": (("--trace", "gone.csv"), 1, "gone.csv"),
    "a name that is none": (("--trace", "t", "--run-ms", "x=5"), 1, "--run-ms"),
    "an estimator alone": (("--trace", "{trace}", "--estimator", "e.npz"), 1, "--estimator: needs --profile"),
    "a run time that is none": (("--trace", "{trace}", "--weights", "1Gi", "--run-ms", "9..5"), 1, "LOW..HIGH"),
    "an objective that is none": (("--trace", "{trace}", "--weights", "1Gi", "--run-ms", "9", "--slo-ms", "-1"), 1, "--slo-ms"),
    "weights that nobody knows": (("--trace", "{trace}", "--run-ms", "5"), 1, "--weights a=SIZE"),
    "a size that is none": (("--trace", "{trace}", "--run-ms", "5", "--weights", "big"), 1, "--weights"),
    "run times that nobody knows": (("--trace", "{trace}", "--weights", "1Gi"), 1, "--run-ms a=MS"),
}


@pytest.mark.parametrize(("options", "code", "word"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_said_in_one_line(functions: Path, trace: Path, options: tuple[str, ...], code: int, word: str) -> None:
    found = plan(functions, *(option.format(trace=trace) for option in options))
    assert found.exit_code == code
    assert word in found.stderr.splitlines()[-1]


def test_a_wrong_document_is_named(tmp_path: Path, trace: Path) -> None:
    path = tmp_path / "f.yaml"
    path.write_text(document("a") + "---" + document("a"))
    found = plan(path, "--trace", trace)
    assert found.exit_code == 1
    assert f"{path}, document 2: metadata.name: 'team/a' stands there twice" in found.stderr


def test_a_prometheus(functions: Path, prometheus: Callable[[Samples], str]) -> None:
    now = int(time.time()) // 60 * 60
    moments = range(now - 2 * 3600, now + 1, 15)

    def counted(service: str, part: str, each: float) -> tuple[str, list[tuple[int, float]]]:
        labels = f'k8s_namespace_name="team",kn_configuration_name="{service}-predictor",k8s_pod_name="p"'
        return f"kn_serving_invocation_duration_seconds_{part}{{{labels}}}", [(at, each * at) for at in moments]

    pod = 'namespace="team",pod="a-predictor-00001-deployment-x"'
    samples = dict(
        [
            *(counted(name, "count", CALLS[name] / 60) for name in ("a", "b")),
            *(counted(name, "sum", CALLS[name] / 60 * 0.030) for name in ("a", "b")),
            (f'kube_pod_container_resource_requests{{{pod},container="c",resource="nvidia_com_gpu"}}', [(at, 2) for at in moments]),
            (f'kube_pod_status_phase{{{pod},phase="Running"}}', [(at, 1) for at in moments]),
        ]
    )
    url = prometheus(samples)
    given = ("--prometheus", url, "--since", "1h", "--latency-from-prometheus", "--weights", "a=200Mi", "--weights", "b=200Mi", "--json")
    found = plan(functions, *given)
    told = json.loads(found.stdout)

    assert {one["function"]: round(one["requests_per_s"]["mean"], 3) for one in told["functions"]} == {"team/a": 0.1, "team/b": 0.2, "team/c": 0.0}
    assert [round(one["run_ms"]["mean"]) for one in told["functions"]] == [30, 30, 1]
    assert told["devices"]["now"] == 2 + 1 + 1
    assert told["devices"]["plan"]["high"] == 1
    assert any("team/c" in note and "never called" in note for note in told["notes"])
    assert any("kube-state-metrics" in note and "team/b, team/c" in note for note in told["notes"])
    assert [one["run_ms_from"].partition(" ")[0] for one in told["functions"]] == ["mean", "mean", "nothing:"]
    assert "how long team/a runs is not known" in plan(functions, *given[:4], "--weights", "200Mi").stderr


def test_a_prometheus_that_is_not_there_is_named(functions: Path) -> None:
    found = plan(functions, "--prometheus", "http://127.0.0.1:9", "--weights", "1Gi", "--run-ms", "5")
    assert found.exit_code == 1
    assert found.stderr.startswith("sluice: http://127.0.0.1:9 cannot be asked")
