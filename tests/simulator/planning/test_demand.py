"""Traces and rates as the load of given functions, and the spells of it that are played."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from contracts.errors import InvalidValue
from contracts.units import S
from simulator.planning.demand import active_part, busiest, by_function, of_rates, of_trace

MINUTE = 60 * S


def azure(folder: Path, *rows: tuple[str, str]) -> Path:
    path = folder / "calls.csv"
    path.write_text("HashOwner,HashApp,HashFunction,Trigger,1,2,3\n" + "".join(f"o,{name},http,{counts}\n" for name, counts in rows))
    return path


def test_names_of_a_trace_are_functions_by_their_keys(tmp_path: Path) -> None:
    path = azure(tmp_path, ("team,b", "0,4,0"), ("team,other", "9,9,9"), ("team,a", "1,2,3"))
    found = of_trace(path, ["team/a", "team/b", "team/c"])
    drawn = found.draw(0)

    assert np.bincount(drawn.function, minlength=3).tolist() == [6, 4, 0]
    assert drawn.span_ns == 3 * MINUTE
    assert found.notes == ("never called in calls.csv: team/c",)


def test_names_without_a_namespace_do_too(tmp_path: Path) -> None:
    path = tmp_path / "requests.csv"
    path.write_text("arrival_s,model\n0,b\n1,a\n2,b\n")
    drawn = of_trace(path, ["team/a", "team/b"]).draw(0)
    assert [drawn.names[number] for number in drawn.function] == ["team/b", "team/a", "team/b"]


def test_a_trace_of_others_lends_its_busiest(tmp_path: Path) -> None:
    path = azure(tmp_path, ("x,f", "1,0,0"), ("x,g", "5,5,5"), ("x,h", "2,2,2"))
    found = of_trace(path, ["team/a", "team/b"])

    assert np.bincount(found.draw(0).function).tolist() == [15, 6]
    assert "names none of the functions" in found.notes[0]
    assert found.draw(0).at_ns.tolist() != found.draw(1).at_ns.tolist()


def test_a_trace_with_too_few_functions_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidValue, match=r"--trace.*names 1 functions.*2 documents.*calls\.csv"):
        of_trace(azure(tmp_path, ("x,f", "1,0,0")), ["team/a", "team/b"])


@given(st.lists(st.floats(0, 50), min_size=1, max_size=40), st.sampled_from([1, 15, 60]))
def test_no_call_is_lost_or_gained(per_s: list[float], step_s: int) -> None:
    drawn = of_rates(["a/b"], np.array([per_s]), step_s * S).draw(0)
    wanted = np.cumsum(per_s) * step_s
    counts = np.bincount(drawn.at_ns // (step_s * S), minlength=len(per_s))

    assert np.abs(np.cumsum(counts) - wanted).max() <= 0.5 + 1e-6
    assert drawn.span_ns == len(per_s) * step_s * S


def test_calls_of_each_function_in_order(tmp_path: Path) -> None:
    path = tmp_path / "requests.csv"
    path.write_text("arrival_s,model\n0,a\n1,b\n2,a\n5,b\n")
    assert [times.tolist() for times in by_function(of_trace(path, ["x/a", "x/b", "x/c"]).draw(0))] == [[0, 2 * S], [S, 5 * S], []]


def test_the_busiest_spells_have_most_work_and_lie_apart() -> None:
    # A hundred short calls in the 10th minute, three long ones in the 30th, one long one in the 50th.
    short, long = np.arange(100) * S // 10 + 10 * MINUTE, np.array([30 * MINUTE, 30 * MINUTE, 30 * MINUTE, 50 * MINUTE])
    starts = busiest([short, long], [1.0, 100.0], 60 * MINUTE, 5 * MINUTE, 3)

    spells = [(start, start + 5 * MINUTE) for start in starts]
    assert spells[0][0] <= 30 * MINUTE < spells[0][1]
    assert sum(any(low <= at < high for low, high in spells) for at in (10 * MINUTE, 30 * MINUTE, 50 * MINUTE)) == 3
    assert all(later >= earlier + 5 * MINUTE for earlier, later in zip(sorted(starts), sorted(starts)[1:], strict=False))


def test_a_short_load_is_one_spell() -> None:
    assert busiest([np.array([1, 2])], [1.0], MINUTE, 5 * MINUTE, 3) == [0]


def test_a_load_without_calls_has_spells_too() -> None:
    assert len(busiest([np.empty(0, np.int64)], [1.0], 60 * MINUTE, 5 * MINUTE, 2)) == 2


@pytest.mark.parametrize(
    ("at_s", "part"),
    [([], 0), ([0], 0.1), ([0, 5], 0.15), ([0, 50], 0.2), ([95], 0.05)],
    ids=["never", "once", "again before", "again after", "last"],
)
def test_how_long_a_pod_that_scales_to_zero_is_up(at_s: list[int], part: float) -> None:
    assert active_part(np.array(at_s, np.int64) * S, 100 * S, 10 * S) == pytest.approx(part)
