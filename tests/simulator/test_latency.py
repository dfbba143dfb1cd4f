"""Run times: laws and tables agree with their points, grow with rows and fall with SMs."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contracts.errors import InvalidArtifact, InvalidValue
from contracts.units import MS
from simulator.latency import Law, RunTimes, Table, tables

V100 = Path(os.environ.get("SLUICE_DATA", Path(__file__).parents[3] / "shared" / "data")) / "v100-latency" / "latency.csv.gz"
GRID = {(rows, sm): 2.0 + rows * 300 / sm for rows in (1, 4, 8) for sm in (10, 50, 100)}


@given(st.integers(1, 64), st.integers(1, 100))
def test_more_rows_take_longer_and_more_sms_do_not(rows: int, sm: int) -> None:
    for latency in (Law(1.0, 2.0, 30.0), Table(GRID)):
        assert latency.run_ms(rows + 1, sm) >= latency.run_ms(rows, sm) * 0.999999
        assert latency.run_ms(rows, min(100, sm + 1)) <= latency.run_ms(rows, sm) * 1.000001


def test_a_table_gives_its_points_and_lies_between_them_elsewhere() -> None:
    table = Table(GRID)
    for (rows, sm), time in GRID.items():
        assert table.run_ms(rows, sm) == pytest.approx(time)
    assert GRID[1, 50] < table.run_ms(2, 50) < GRID[4, 50]
    assert table.run_ms(1, 5) == pytest.approx(2 * GRID[1, 10]), "half the SMs of the least measured"
    assert table.run_ms(16, 100) == pytest.approx(2 * GRID[8, 100]), "twice the rows of the most measured"


def test_a_model_that_cannot_fill_the_sms_gains_nothing_from_more() -> None:
    law = Law(fixed_ms=1.0, row_ms=4.0, needs_sm=25.0)
    assert law.run_ms(1, 25) == law.run_ms(1, 100) == 5.0
    assert law.run_ms(4, 50) == 1.0 + 2 * 16.0


def test_run_times_are_ns_of_the_device() -> None:
    times = RunTimes({"a/b": Law(1.0, 2.0)})
    assert times.run_ns("a/b", 1, 100) == times.run_ns("a/b", 1, 100) == 3 * MS


@pytest.mark.parametrize("points", [{}, {(1, 10): 1.0, (2, 20): 1.0}, {(1, 10): 0.0}, {(1, 10): float("nan")}])
def test_a_table_with_holes_is_none(points: dict[tuple[int, int], float]) -> None:
    with pytest.raises(InvalidValue):
        Table(points)


@pytest.mark.skipif(not V100.is_file(), reason="the V100 table is not here (SLUICE_DATA)")
def test_the_v100_table() -> None:
    found = tables(V100)
    assert len(found) == 60
    assert found["resnet50"].run_ms(8, 100) < found["resnet50"].run_ms(8, 10)
    assert found["resnet50"].run_ms(8, 5) == pytest.approx(found["resnet50"].run_ms(8, 10) * 2, rel=0.3)


@pytest.mark.parametrize("content", ["", "model,batch\nm,1\n", "model,batch,sm_percent,quota_percent,latency_ms\nm,1,10,50,2\n"])
def test_a_file_that_is_no_table_is_named(content: str, tmp_path: Path) -> None:
    path = tmp_path / "odd.csv"
    path.write_text(content)
    with pytest.raises(InvalidArtifact, match=r"odd\.csv"):
        tables(path)
