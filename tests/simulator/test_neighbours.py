"""Batches beside each other: the factors of `sluice profile interference`, pair by pair, and what they do to a simulated node."""

from pathlib import Path

import pytest
import yaml

from contracts.errors import InvalidValue
from profiler.interference import Demand, Pair, fit
from simulator.latency import Law
from simulator.neighbours import Neighbours
from simulator.run import simulate
from simulator.scenario import build, load

LIGHT, HEAVY = Demand(0.1, 0.1), Demand(0.8, 0.1)
PAIRS = [
    Pair("default/light", "default/heavy", 50, 50, LIGHT, HEAVY, 1.4),
    Pair("default/heavy", "default/light", 50, 50, HEAVY, LIGHT, 1.05),
]
LATENCIES = {"x/one": Law(1.0, 9.0), "x/two": Law(1.0, 9.0)}
MODELS = {"x/one": "light", "x/two": "default/heavy"}


def test_factors_are_those_that_were_measured() -> None:
    model = fit("d", PAIRS)
    beside = Neighbours(model, LATENCIES, MODELS)
    assert beside.slowdown("x/one", 50, []) == 1
    assert beside.slowdown("x/one", 50, [("x/two", 50)]) == pytest.approx(model.slowdown(LIGHT, HEAVY))
    assert beside.slowdown("x/one", 25, [("x/two", 50), ("x/two", 25)]) > beside.slowdown("x/one", 25, [("x/two", 50)])


def test_on_fewer_sms_a_neighbour_asks_for_less_at_a_time() -> None:
    model = fit("d", PAIRS)
    beside = Neighbours(model, LATENCIES, MODELS)
    slower = LATENCIES["x/two"].run_ms(1, 50) / LATENCIES["x/two"].run_ms(1, 10)
    assert beside.slowdown("x/one", 50, [("x/two", 10)]) == pytest.approx(
        model.slowdown(LIGHT, Demand(HEAVY.memory * slower, HEAVY.compute * slower))
    )


def test_a_function_that_was_not_measured_is_named() -> None:
    with pytest.raises(InvalidValue, match=r"there are: default/heavy, default/light.*'other'"):
        Neighbours(fit("d", PAIRS), LATENCIES, {"x/one": "other"})


def scenario(folder: Path, interference: str) -> Path:
    """Two functions on half of the SMs each, which keep them busy nearly all the time."""
    groups = [
        {
            "name": name,
            "weights": "1Mi",
            "time": {"fixed_ms": 1, "row_ms": 9},
            "load": {"per_minute": 2400},
            "sm_percent": 50,
            "quota_percent": 90,
            "max_batch": 1,
        }
        for name in ("light", "heavy")
    ]
    path = folder / "scenario.yaml"
    path.write_text(yaml.safe_dump({"name": "pair", "span_s": 10, "functions": groups, **({"interference": interference} if interference else {})}))
    return path


def test_a_node_runs_slower_where_functions_slow_each_other_down(tmp_path: Path) -> None:
    fit("d", PAIRS).save(tmp_path / "pairs.json")
    alone, beside = (simulate("sluice", build(load(scenario(tmp_path, name)), 0)).records for name in ("", "pairs.json"))
    light, heavy = (beside[name].parts["run"].mean_ms / alone[name].parts["run"].mean_ms for name in ("default/light", "default/heavy"))
    assert 1.05 < light <= 1.4
    assert 1.0 <= heavy < light


@pytest.mark.parametrize("file", ["gone.json", "torn.json"])
def test_a_file_that_cannot_be_used_is_named(file: str, tmp_path: Path) -> None:
    (tmp_path / "torn.json").write_text("{")
    with pytest.raises(InvalidValue, match=rf"interference: cannot be used.*{file}"):
        build(load(scenario(tmp_path, file)), 0)
