"""`sluice profile` as people and machines call it: what it says, what it writes, and how it fails."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from profiler.device import DeviceFacts
from profiler.estimator import Estimator
from profiler.features import COLUMNS
from profiler.points import COLUMNS as COLUMNS_OF_POINTS
from profiler.points import Point, Table
from sluice.cli import main

ROOT = Path(__file__).parents[2]
FACTS = DeviceFacts("cpu", "a processor", 1, 2500.0, 1e11, 2e10, 1e10, 1 << 30)
COMMANDS = ("sweep", "fit", "evaluate", "show", "need", "interference", "features")


def sluice(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["profile", *map(str, arguments)])


def point(function: str, batch: int, sm: int, quota: float, **changes: Any) -> Point:
    """A model of 4 ms and 1 ms a row on the whole device, 1 / SM slower in its share, and 1 / quota between its batches."""
    service = (4.0 + batch) * 100 / sm
    latency = service * 100 / quota
    fields: dict[str, Any] = {
        "function": function,
        "model_format": "sluice-catalog",
        "model_source": "mlp",
        "model_digest": "d" * 64,
        "program_id": "catalog:mlp:{}",
        "device": "cpu:0",
        "batch": batch,
        "sm_percent": sm,
        "quota_percent": quota,
        "samples": 100,
        "latency_mean_ms": latency,
        "latency_p50_ms": latency,
        "latency_p95_ms": latency,
        "latency_p99_ms": latency,
        "service_mean_ms": service,
        "service_p50_ms": service,
        "service_p95_ms": service * 1.02,
        "service_p99_ms": service * 1.05,
        "gpu_ms": service,
        "swap_ms": 1.0,
        "device_bytes": 1 << 20,
        "duration_s": 1.0,
        "started_at": datetime(2026, 1, 2, tzinfo=UTC),
        "beside_load": False,
        "seed": 1,
    }
    return Point(**fields | changes)


@pytest.fixture
def profiles(tmp_path: Path) -> Path:
    """A folder with a table of two functions, each measured at 27 configurations."""
    with Table(tmp_path / "points.parquet", "cpu:0", FACTS) as table:
        for function in ("default/a", "team/b"):
            for batch in (1, 2, 8):
                for sm in (25, 50, 100):
                    for quota in (20.0, 50.0, 100.0):
                        table.append(point(function, batch, sm, quota))
    return tmp_path


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_examples(command: str) -> None:
    found = sluice(command, "--help")
    assert found.exit_code == 0
    assert f"Examples:\n    sluice profile {command}" in found.output


def test_help_waits_for_nothing_heavy() -> None:
    code = "import sys, sluice.cli; print(sorted({'torch', 'numpy', 'sklearn', 'pyarrow', 'matplotlib', 'scipy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"


class TestNeed:
    def test_people_get_the_share_and_annotations_to_paste(self, profiles: Path) -> None:
        found = sluice("need", "a", "--slo-ms", 100, "--rate", 20, "--profiles", profiles)
        assert found.exit_code == 0, found.output
        assert "% of the SMs for" in found.output
        assert "against 100 ms" in found.output
        assert 'sluice.dev/sm-percent: "' in found.output

    def test_machines_get_all_of_it(self, profiles: Path) -> None:
        found = json.loads(sluice("need", "team/b", "--slo-ms", 100, "--rate", 20, "--profiles", profiles, "--json").output)
        option = found["option"]
        assert (found["function"], found["device"], found["verdict"]) == ("team/b", "cpu:0", "share")
        assert found["objective"] == {"latency_ms": 100, "rate_per_s": 20, "percentile": 99}
        assert option["area_percent"] == pytest.approx(option["sm_percent"] * option["quota_percent"] / 100)
        assert 0 < option["low_ms"] <= option["latency_ms"] <= option["high_ms"] <= 100

    def test_when_nothing_will_do_it_says_what_would_and_ends_with_3(self, profiles: Path) -> None:
        found = sluice("need", "a", "--slo-ms", 100, "--rate", 5000, "--profiles", profiles)
        assert found.exit_code == 3
        assert "nothing will do at 5000 requests/s: the whole device keeps 100 ms up to" in found.output.replace("\n", " ")

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (("a", "--slo-ms", 0, "--rate", 5), "slo-ms: must be greater than 0, got 0.0"),
            (("a", "--slo-ms", 10, "--rate", "nan"), "rate: must be greater than 0, got nan"),
            (("a", "--slo-ms", 10, "--rate", 5, "--percentile", 100), "percentile: must lie between 0 and 100, got 100.0"),
            (("c", "--slo-ms", 10, "--rate", 5), "no measurements of 'c' (there are: default/a, team/b)"),
            (("a", "--slo-ms", 10, "--rate", 5, "--device", "gpu:7"), "no measurements of default/a on 'gpu:7' (there are: cpu:0)"),
        ],
        ids=["an objective of nothing", "a rate that is no number", "a percentile of 100", "an unknown function", "an unknown device"],
    )
    def test_what_makes_no_sense_is_said_in_one_line(self, profiles: Path, arguments: tuple[object, ...], said: str) -> None:
        found = sluice("need", *arguments, "--profiles", profiles)
        assert found.exit_code == 1
        assert found.stderr.startswith("sluice: ")
        assert said in found.stderr
        assert found.stderr.count("\n") == 1

    def test_a_function_of_two_devices_must_be_told_which(self, tmp_path: Path) -> None:
        for device in ("cpu:0", "cpu:1"):
            with Table(tmp_path / "points.parquet", device, FACTS) as table:
                table.append(point("default/a", 1, 100, 100, device=device))
        found = sluice("need", "a", "--slo-ms", 10, "--rate", 5, "--profiles", tmp_path)
        assert found.exit_code == 1
        assert "default/a was measured on several devices: name one of cpu:0, cpu:1 with --device" in found.stderr
        assert sluice("need", "a", "--slo-ms", 100, "--rate", 1, "--profiles", tmp_path, "--device", "cpu:1").exit_code == 0


@pytest.mark.parametrize("command", [("show", "a"), ("need", "a", "--slo-ms", 10, "--rate", 5), ("fit",)], ids=lambda command: command[0])
class TestTables:
    """Tables that cannot be read, for every command that reads them."""

    @pytest.mark.parametrize("spoil", ["empty", "torn", "foreign"])
    def test_one_that_is_spoilt_is_named_and_left_as_it_is(self, profiles: Path, command: tuple[object, ...], spoil: str) -> None:
        table = profiles / "points.parquet"
        content = {"empty": b"", "torn": table.read_bytes()[:-200], "foreign": b"a,b\n1,2\n" * 9}[spoil]
        table.write_bytes(content)
        found = sluice(*command, "--profiles", profiles)
        assert found.exit_code == 1
        assert found.stderr.startswith(f"sluice: {table} is no table of measurements")
        assert found.stderr.count("\n") == 1
        assert table.read_bytes() == content

    def test_one_that_is_missing_is_named(self, tmp_path: Path, command: tuple[object, ...]) -> None:
        found = sluice(*command, "--profiles", tmp_path)
        assert found.exit_code == 1
        assert f"{tmp_path}/points.parquet: there is no such table of measurements" in found.stderr


class TestShow:
    def test_people_get_a_table_for_each_batch(self, profiles: Path) -> None:
        found = sluice("show", "a", "--profiles", profiles)
        assert found.exit_code == 0, found.output
        assert "default/a on cpu:0 (a processor, 1 processors), 27 configurations measured" in found.output
        assert [line.strip() for line in found.output.splitlines() if line.startswith("batch")] == ["batch 1", "batch 2", "batch 8"]

    def test_machines_get_the_grid_and_what_was_measured(self, profiles: Path) -> None:
        found = json.loads(sluice("show", "a", "--profiles", profiles, "--slo-ms", 100, "--rate", 20, "--json").output)
        assert (found["sm_percent"], found["quota_percent"]) == ([25, 50, 100], [20, 50, 100])
        assert [entry["batch"] for entry in found["batches"]] == [1, 2, 8]
        mean, low, high = (np.array(found["batches"][0][name]) for name in ("mean_ms", "low_ms", "high_ms"))
        assert mean.shape == (3, 3)
        assert ((low <= mean) & (mean <= high)).all()
        assert mean[2, 2] == pytest.approx(5, rel=0.2)
        assert len(found["measured"]) == 27
        assert found["need"]["verdict"] == "share"

    def test_plots_are_pictures(self, profiles: Path, tmp_path: Path) -> None:
        found = sluice("show", "team/b", "--profiles", profiles, "-o", tmp_path / "new" / "plots", "--slo-ms", 100, "--rate", 20, "--json")
        assert found.exit_code == 0, found.output
        files = [Path(file) for file in json.loads(found.output)["plots"]]
        assert [file.name for file in files] == ["team.b-heatmap.png", "team.b-curves.png"]
        for file in files:
            content = file.read_bytes()
            assert content.startswith(b"\x89PNG")
            assert len(content) > 20_000

    def test_one_measured_point_is_enough_for_tables_and_plots(self, tmp_path: Path) -> None:
        with Table(tmp_path / "points.parquet", "cpu:0", FACTS) as table:
            table.append(point("default/a", 1, 100, 100, beside_load=True))
        found = sluice("show", "a", "--profiles", tmp_path, "-o", tmp_path / "plots")
        assert found.exit_code == 0, found.output
        assert "1 of them beside other load" in found.output
        assert len(list((tmp_path / "plots").glob("*.png"))) == 2

    def test_half_an_objective_is_a_usage_error(self, profiles: Path) -> None:
        found = sluice("show", "a", "--profiles", profiles, "--rate", 2)
        assert found.exit_code == 2
        assert "give --slo-ms and --rate together" in found.stderr

    def test_what_another_model_of_the_same_name_did_does_not_count(self, tmp_path: Path) -> None:
        with Table(tmp_path / "points.parquet", "cpu:0", FACTS) as table:
            table.append(point("default/a", 1, 100, 100, model_digest="old", latency_mean_ms=900.0))
            table.append(point("default/a", 1, 100, 100, started_at=datetime(2026, 2, 1, tzinfo=UTC)))
        found = json.loads(sluice("show", "a", "--profiles", tmp_path, "--json").output)
        assert [entry["latency_mean_ms"] for entry in found["measured"]] == [5.0]


class TestFit:
    def test_what_it_writes_is_taken_up_by_the_others(self, profiles: Path) -> None:
        found = sluice("fit", "--profiles", profiles, "--json")
        assert found.exit_code == 0, found.output
        assert json.loads(found.output)["models"] == 2
        assert list(Estimator.load(profiles / "estimator.npz").beliefs) == ["a processor x1"]
        assert sluice("show", "a", "--profiles", profiles).exit_code == 0

    def test_an_estimator_that_is_torn_is_named(self, profiles: Path) -> None:
        (profiles / "estimator.npz").write_bytes(b"PK\x03\x04 torn")
        found = sluice("show", "a", "--profiles", profiles)
        assert found.exit_code == 1
        assert f"{profiles}/estimator.npz is no estimator" in found.stderr

    def test_one_that_was_asked_for_must_be_there(self, profiles: Path) -> None:
        found = sluice("show", "a", "--profiles", profiles, "--estimator", profiles / "other.npz")
        assert found.exit_code == 1
        assert "other.npz" in found.stderr
        assert found.stderr.count("\n") == 1


class TestEvaluate:
    def test_data_that_is_not_there_is_named(self, tmp_path: Path) -> None:
        found = sluice("evaluate", "--data", tmp_path)
        assert found.exit_code == 1
        assert "latency.csv.gz" in found.stderr
        assert found.stderr.count("\n") == 1

    def test_a_number_of_probes_that_is_none(self, tmp_path: Path) -> None:
        found = sluice("evaluate", "--data", tmp_path, "--probes", "16,0")
        assert found.exit_code == 1
        assert "--probes" in found.stderr


class TestFeatures:
    def test_a_run_is_counted(self) -> None:
        found = json.loads(sluice("features", "mlp-a", "-f", ROOT / "examples/functions.yaml", "--batch", 2, "--json").output)
        assert found["function"] == "default/mlp-a"
        assert found["totals"]["flops"] > 0
        assert found["totals"]["kernels"] == sum(kind["kernels"] for kind in found["kinds"].values())
        assert {name.rpartition("_")[0] for name in COLUMNS} > set(found["kinds"])

    def test_a_size_that_is_none_is_named(self) -> None:
        found = sluice("features", "minilm", "-f", ROOT / "examples/functions.yaml", "--size", "seq=x")
        assert found.exit_code == 1
        assert "--size: must be written name=number, got 'seq=x'" in found.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("minilm", "--device", "gpu:0"), "--device: is no device that this version measures (write cpu:0), got 'gpu:0'"),
        (("nobody",), "no function 'nobody' in"),
        (("minilm", "--sm", "0,50"), "sm-percent: must be a whole percent from 1 to 100, got 0"),
        (("minilm", "--quota", "0.001"), "quota-percent: must have at most two decimals"),
        (("minilm", "--batches", "2000"), "batch: must be from 1 to 1024, got 2000"),
    ],
    ids=["an unknown device", "an unknown function", "no SMs", "a quota too fine", "a batch too long"],
)
def test_a_sweep_that_cannot_be_is_refused_before_anything_starts(tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    found = sluice("sweep", *arguments, "-f", ROOT / "examples/functions.yaml", "--profiles", tmp_path / "new")
    assert found.exit_code == 1
    assert said in found.stderr
    assert found.stderr.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_a_sweep_measures_through_a_real_agent_and_lanes(tmp_path: Path) -> None:
    found = sluice(
        *("sweep", "mlp-a", "-f", ROOT / "examples/functions.yaml", "--profiles", tmp_path, "--device-memory", "64Mi"),
        *("--batches", 1, "--sm", 100, "--quota", "50,100", "--full-grid", "--beside-load", "--json"),
    )
    assert found.exit_code == 0, found.output
    told = json.loads(found.stdout)
    assert told["points"] == f"{tmp_path}/points.parquet"
    assert [(one["function"], one["reason"], one["measured"]) for one in told["outcomes"]] == [("default/mlp-a", "grid", 2)]
    shown = json.loads(sluice("show", "mlp-a", "--profiles", tmp_path, "--json").output)
    assert sorted(one["quota_percent"] for one in shown["measured"]) == [50, 100]


def test_the_guide_describes_every_column_and_every_command() -> None:
    guide = (ROOT / "docs/profiling.md").read_text()
    for name, (kind, meaning) in COLUMNS_OF_POINTS.items():
        assert f"| `{name}` | {kind} | {meaning} |" in guide
    for command in COMMANDS:
        assert f"| `{command}` |" in guide
