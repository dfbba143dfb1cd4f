"""A simulation held against a real run: every figure's error, and records that do not fit are named."""

import json
from pathlib import Path

import msgspec
import pytest
import yaml
from click.testing import CliRunner

from contracts.errors import InvalidArtifact, InvalidValue
from simulator import against, report
from simulator.against import Real, RealFunction
from simulator.run import simulate
from simulator.scenario import build, load
from sluice.cli import main

SCENARIO = {
    "name": "small",
    "span_s": 30,
    "functions": [
        {"name": "a", "weights": "1Mi", "time": {"fixed_ms": 10}, "load": {"per_minute": 300}, "around_ms": 5},
        {"name": "b", "weights": "1Mi", "time": {"fixed_ms": 20}, "load": {"per_minute": 60}},
    ],
    "around_ms": 1,
}
REAL = Real("small", 1, (RealFunction("default/a", (10.0,) * 99 + (50.0,), 0), RealFunction("default/b", (30.0,) * 100, 1)), gpu_s=2.0, swaps=0)


def files(folder: Path, real: Real = REAL) -> tuple[Path, Path]:
    scenario, record = folder / "scenario.yaml", folder / "real.json"
    scenario.write_text(yaml.safe_dump(SCENARIO))
    record.write_bytes(against.encode(real))
    return scenario, record


def test_each_figure_has_its_error(tmp_path: Path) -> None:
    world = build(load(files(tmp_path)[0]), 1)
    outcome = simulate("sluice", world)
    lines = {line.figure: line for line in against.compare(REAL, report.figures(world, outcome), report.functions(world, outcome))}
    assert list(lines)[:5] == ["p50 ms", "p99 ms", "GPU seconds", "swaps", "answered"]
    of_a = lines["default/a p50 ms"]
    assert (of_a.real, of_a.simulated) == (10.0, pytest.approx(15.0, rel=0.02)), "a run of 10 ms, and 5 ms around it"
    assert of_a.error_percent == pytest.approx(50, abs=2)
    assert lines["default/b p50 ms"].error_percent == pytest.approx(-30, abs=3)
    assert lines["p99 ms"].real == 30.0
    assert lines["swaps"].error_percent is None, "there were none"
    assert lines["GPU seconds"].simulated == outcome.busy_s


def test_the_command_line_says_how_far_it_is_off(tmp_path: Path) -> None:
    scenario, record = map(str, files(tmp_path))
    shown = CliRunner().invoke(main, ["simulate", scenario, "--against", record, "--seeds", "2", "--processes", "1"], catch_exceptions=False)
    assert shown.exit_code == 0
    assert "simulated against real" in shown.output
    assert "GPU seconds" in shown.output
    told = CliRunner().invoke(main, ["simulate", scenario, "--against", record, "--seeds", "2", "--processes", "1", "--json"], catch_exceptions=False)
    assert "default/a p99 ms" in [line["figure"] for line in json.loads(told.stdout.splitlines()[-1])["against"]]


@pytest.mark.parametrize(
    ("change", "asked", "named"),
    [
        ({"scenario": "other"}, 2, "another scenario than 'small'.*other"),
        ({"seed": 2}, 2, "--seeds.*2"),
    ],
)
def test_a_record_of_something_else_is_refused(change: dict[str, object], asked: int, named: str, tmp_path: Path) -> None:
    _, record = files(tmp_path, msgspec.structs.replace(REAL, **change))
    with pytest.raises(InvalidValue, match=named):
        against.read(record, "small", asked)


def test_other_functions_are_refused(tmp_path: Path) -> None:
    world = build(load(files(tmp_path)[0]), 1)
    outcome = simulate("sluice", world)
    with pytest.raises(InvalidValue, match=r"default/a, default/b"):
        against.compare(msgspec.structs.replace(REAL, functions=REAL.functions[:1]), report.figures(world, outcome), report.functions(world, outcome))


@pytest.mark.parametrize("content", [None, "{", '{"scenario": 1}'])
def test_a_file_that_is_no_record_is_named(content: str | None, tmp_path: Path) -> None:
    path = tmp_path / "real.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InvalidArtifact, match=r"--against: is no record.*real\.json"):
        against.read(path, "small", 1)


def test_without_sluices_policy_there_is_nothing_to_compare(tmp_path: Path) -> None:
    scenario, record = map(str, files(tmp_path))
    found = CliRunner().invoke(main, ["simulate", scenario, "--policy", "torpor", "--against", record])
    assert found.exit_code == 1
    assert "--against" in found.output
