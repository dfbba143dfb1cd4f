import json

import pytest
from click.testing import CliRunner
from rich.console import Console

from benchmarks import __main__ as command
from benchmarks import result
from benchmarks.result import Metric, Result

FOUND = Result({"wrong": Metric(0, "answers", 0), "rate": Metric(15_000.0, "1/s", 20_000, "higher"), "plain": Metric(1.25, "ms")}, seeds=(1, 2))


@pytest.mark.parametrize(
    ("metric", "met"),
    [
        (Metric(1.0, "x", 1.0), True),
        (Metric(1.1, "x", 1.0), False),
        (Metric(1.0, "x", 1.0, "higher"), True),
        (Metric(0.9, "x", 1.0, "higher"), False),
        (Metric(float("nan"), "x", 1.0), False),
        (Metric(5.0, "x"), True),
    ],
)
def test_a_target_is_met_on_its_better_side(metric, met):
    assert metric.met is met


def test_the_file_holds_what_a_reader_needs_to_judge_the_figures(tmp_path):
    path = tmp_path / "new" / "node.json"
    result.write(path, "node", FOUND)
    document = json.loads(path.read_text())
    assert list(document) == ["benchmark", "machine", "versions", "date", "seeds", "metrics"]
    assert (document["benchmark"], document["seeds"]) == ("node", [1, 2])
    assert document["metrics"]["rate"] == {"value": 15_000.0, "unit": "1/s", "target": 20_000, "better": "higher"}
    assert document["metrics"]["plain"]["target"] is None
    assert document["machine"]["cores"] >= 1
    assert document["versions"]["python"].startswith("3.")
    assert document["date"].endswith("+00:00")


def test_a_missed_target_is_shown():
    console = Console(record=True, width=100)
    result.show("node", FOUND, console)
    lines = console.export_text().splitlines()
    assert [line for line in lines if "missed" in line] == [line for line in lines if "rate" in line] != []


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of benchmarks in place of the project's own, found by the same command."""
    (tmp_path / "probe.py").write_text(
        "from benchmarks.result import Metric, Result\ndef run(quick):\n    return Result({'quick': Metric(float(quick), 'bool', 2.0, 'higher')})\n"
    )
    (tmp_path / "helper.py").write_text("X = 1\n")
    monkeypatch.setattr(command, "__file__", str(tmp_path / "__main__.py"))
    monkeypatch.setattr("benchmarks.__path__", [str(tmp_path)])
    return tmp_path


def test_a_benchmark_is_run_by_name_and_a_missed_target_does_not_fail_the_command(folder):
    done = CliRunner().invoke(command.main, ["probe", "--quick", "-o", str(folder / "out.json")])
    assert done.exit_code == 0, done.output
    assert "missed" in done.output
    assert json.loads((folder / "out.json").read_text())["metrics"]["quick"]["value"] == 1.0


def test_the_list_names_benchmarks_alone(folder):
    done = CliRunner().invoke(command.main, ["--list"])
    assert (done.exit_code, done.output.split()) == (0, ["probe"])


def test_an_unknown_benchmark_is_refused_with_those_there_are(folder):
    done = CliRunner().invoke(command.main, ["prob"])
    assert done.exit_code == 2
    assert "no benchmark 'prob'; there are: probe" in done.output
