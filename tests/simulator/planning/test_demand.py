"""Traces and rates as the load of given functions, and the spells of it that are played."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from contracts.errors import InvalidValue
from contracts.units import S
from simulator.planning.demand import active_part, busiest, of_rates, of_trace

MINUTE = 60 * S


def azure(folder: Path, *rows: tuple[str, str]) -> Path:
    path = folder / "calls.csv"
    path.write_text("HashOwner,HashApp,HashFunction,Trigger,1,2,3\n" + "".join(f"o,{name},http,{counts}\n" for name, counts in rows))
    return path


def test_names_of_a_trace_are_functions_by_their_keys(tmp_path: Path) -> None:
    path = azure(tmp_path, ("team,b", "0,4,0"), ("team,other", "9,9,9"), ("team,a", "1,2,3"))
    found = of_trace(path, ["team/a", "team/b", "team/c"])

    assert found.counts.tolist() == [[1, 2, 3], [0, 4, 0], [0, 0, 0]]
    assert found.span_ns == 3 * MINUTE
    assert found.notes == ("never called in calls.csv: team/c",)
    assert (found.mean_per_s(0), found.peak_per_s(0)) == pytest.approx((6 / 180, 3 / 60))


def test_names_without_a_namespace_do_too(tmp_path: Path) -> None:
    path = tmp_path / "requests.csv"
    path.write_text("arrival_s,model\n0,b\n1,a\n2,b\n")
    found = of_trace(path, ["team/a", "team/b"])
    assert [found.calls(0, function, 0, 10 * S).tolist() for function in (0, 1)] == [[S], [0, 2 * S]]
    assert found.calls(0, 1, 1, 2 * S).tolist() == []


def test_a_trace_of_others_lends_its_busiest(tmp_path: Path) -> None:
    path = azure(tmp_path, ("x,f", "1,0,0"), ("x,g", "5,5,5"), ("x,h", "2,2,2"))
    found = of_trace(path, ["team/a", "team/b"])

    assert found.counts.tolist() == [[5, 5, 5], [2, 2, 2]]
    assert "names none of the functions" in found.notes[0]
    first, second = (found.calls(seed, 0, 0, 3 * MINUTE).tolist() for seed in (0, 1))
    assert first == sorted(first) != second
    assert first == found.calls(0, 0, 0, 3 * MINUTE).tolist()


def test_a_trace_with_too_few_functions_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidValue, match=r"--trace.*names 1 functions.*2 documents.*calls\.csv"):
        of_trace(azure(tmp_path, ("x,f", "1,0,0")), ["team/a", "team/b"])


@given(st.lists(st.floats(0, 50), min_size=1, max_size=40), st.sampled_from([1, 15, 60]))
def test_no_call_is_lost_or_gained(per_s: list[float], step_s: int) -> None:
    found = of_rates(["a/b"], np.array([per_s]), step_s * S)

    assert np.abs(np.cumsum(found.counts[0]) - np.cumsum(per_s) * step_s).max() <= 0.5 + 1e-6
    assert found.span_ns == len(per_s) * step_s * S


@given(st.lists(st.integers(0, 90), min_size=2, max_size=6, unique=True), st.integers(0, 3))
def test_a_spell_s_calls_are_the_same_whatever_spell_is_asked(cuts: list[int], seed: int) -> None:
    found = of_rates(["a/a", "a/b"], np.array([[3.0, 0.0, 7.0], [1.0, 2.0, 0.0]]), 30 * S)
    edges = sorted(cuts)
    parts = [found.calls(seed, 1, low * S, high * S) for low, high in pairwise(edges)]

    assert np.concatenate(parts).tolist() == found.calls(seed, 1, edges[0] * S, edges[-1] * S).tolist()
    times = found.calls(seed, 1, 0, 90 * S)
    assert np.bincount(times // (30 * S), minlength=3).tolist() == [30, 60, 0]
    assert (np.diff(times) >= 0).all()


def test_the_busiest_spells_have_most_load_and_lie_apart() -> None:
    load = np.zeros(60)
    load[10:12], load[30], load[50] = 1.0, 3.0, 1.5
    starts = busiest(load, 60 * MINUTE, MINUTE, 5 * MINUTE, 3)

    assert starts[0] <= 30 * MINUTE < starts[0] + 5 * MINUTE
    assert starts[1] <= 10 * MINUTE < starts[1] + 5 * MINUTE
    assert all(later - earlier >= 5 * MINUTE for earlier, later in pairwise(sorted(starts)))
    assert sum(start <= 50 * MINUTE < start + 5 * MINUTE for start in starts) == 1


def test_a_short_load_is_one_spell() -> None:
    assert busiest(np.ones(1), MINUTE, MINUTE, 5 * MINUTE, 3) == [0]


def test_no_more_spells_than_there_are() -> None:
    assert sorted(busiest(np.zeros(11), 11 * MINUTE, MINUTE, 5 * MINUTE, 5)) == [0, 5 * MINUTE]


@pytest.mark.parametrize(
    ("counts", "part"),
    [([0] * 10, 0.0), ([1] + [0] * 9, 0.3), ([1, 3] + [0] * 8, 0.4), ([0] * 9 + [7], 0.1), ([5] * 10, 1.0)],
    ids=["never", "once", "again", "at the end", "always"],
)
def test_how_long_a_pod_that_scales_to_zero_is_up(counts: list[int], part: float) -> None:
    assert active_part(np.array(counts), MINUTE, 2 * MINUTE) == pytest.approx(part)
