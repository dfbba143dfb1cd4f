"""Run times from profiles and estimators: the right column, the spread of the batches, and what is said when a file or a model is not there."""

import math
import statistics
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from contracts.errors import InvalidArtifact, InvalidValue, NotFound
from profiler.dataset import population
from profiler.device import DeviceFacts
from profiler.estimator import Estimator
from profiler.points import Point, Table, read
from simulator.latency import Draws, Law, RunTimes
from simulator.measured import Profiles, Scaled, factors_of

FACTS = DeviceFacts("cpu", "a processor", 1, 2500.0, 1e11, 2e10, 1e10, 1 << 30)
FASTER = DeviceFacts("cpu", "another", 1, 2500.0, 1e11, 2e10, 1e10, 1 << 30)
GRID = [(batch, sm) for batch in (1, 2, 4) for sm in (25, 50, 100)]


def gpu_ms(batch: int, sm: int, unit_ms: float = 4.0) -> float:
    return unit_ms * (1 + batch * 100 / sm) / 2


def point(batch: int, sm: int, quota: float = 100.0, gpu: float | None = None, **changes: Any) -> Point:
    """A run takes 0.9 to 1.5 times its median, and the way to it and back 1 ms."""
    run = gpu_ms(batch, sm) if gpu is None else gpu
    fields: dict[str, Any] = {
        "function": "default/a",
        "model_format": "sluice-catalog",
        "model_source": "mlp",
        "model_digest": "d" * 64,
        "program_id": "p",
        "device": "cpu:0",
        "batch": batch,
        "sm_percent": sm,
        "quota_percent": quota,
        "samples": 100,
        **{f"latency_{name}_ms": (run + 1) * 100 / quota for name in ("mean", "p50", "p95", "p99")},
        "service_mean_ms": run + 1,
        "service_p50_ms": 0.98 * run + 1,
        "service_p95_ms": 1.2 * run + 1,
        "service_p99_ms": 1.5 * run + 1,
        "gpu_ms": run,
        "swap_ms": 3.0,
        "device_bytes": 1 << 20,
        "duration_s": 1.0,
        "started_at": datetime(2026, 1, 2, tzinfo=UTC),
        "beside_load": False,
        "seed": 1,
    }
    return Point(**{**fields, **changes})


def written(points: Sequence[Point], path: Path, facts: DeviceFacts = FACTS) -> Path:
    with Table(path, points[0].device, facts) as table:
        for each in points:
            table.append(each)
    return path


def test_a_profile_gives_the_time_on_the_sms_without_the_way_and_without_the_wait_for_a_quota(tmp_path: Path) -> None:
    table = written([point(*at, quota) for at in GRID for quota in (20, 100)], tmp_path / "points.parquet")
    latency = Profiles(table).latency("a")
    for batch, sm in GRID:
        assert latency.run_ms(batch, sm) == pytest.approx(gpu_ms(batch, sm))
    assert gpu_ms(2, 100) < latency.run_ms(3, 100) < gpu_ms(4, 100)


def test_of_two_quotas_the_one_that_made_it_wait_less_counts(tmp_path: Path) -> None:
    table = written([point(1, 100, 50, gpu=8.0), point(1, 100, 10, gpu=9.0)], tmp_path / "points.parquet")
    assert Profiles(table).latency("default/a").run_ms(1, 100) == pytest.approx(8.0)


def test_what_the_sweep_left_out_is_filled_in(tmp_path: Path) -> None:
    table = written([point(*at) for at in GRID if at != (2, 50)], tmp_path / "points.parquet")
    assert Profiles(table).latency("a").run_ms(2, 50) == pytest.approx(gpu_ms(2, 50), rel=0.3)


def test_an_estimator_knows_the_rest_from_one_probe(tmp_path: Path) -> None:
    others = [
        point(*at, quota, gpu=gpu_ms(*at, unit), function=f"default/{name}")
        for name, unit in (("b", 3.0), ("c", 5.0), ("d", 9.0))
        for at in GRID
        for quota in (20, 50, 100)
    ]
    Estimator.fit(population(read(written(others, tmp_path / "others.parquet")))).save(tmp_path / "trained.npz")
    probed = written([point(1, 100)], tmp_path / "points.parquet")
    trained, alone = (Profiles(probed, path).latency("a") for path in (tmp_path / "trained.npz", None))
    assert trained.run_ms(4, 25) == pytest.approx(gpu_ms(4, 25), rel=0.3)
    assert abs(math.log(trained.run_ms(4, 25) / gpu_ms(4, 25))) < abs(math.log(alone.run_ms(4, 25) / gpu_ms(4, 25)))
    low, high = (Profiles(probed, tmp_path / "trained.npz").latency("a", level=level) for level in ("low", "high"))
    assert low.run_ms(4, 25) < trained.run_ms(4, 25) < high.run_ms(4, 25)


def test_an_estimator_of_another_device_is_refused(tmp_path: Path) -> None:
    others = written([point(*at) for at in GRID], tmp_path / "others.parquet", FASTER)
    Estimator.fit(population(read(others))).save(tmp_path / "trained.npz")
    profiles = Profiles(written([point(1, 100)], tmp_path / "points.parquet"), tmp_path / "trained.npz")
    with pytest.raises(InvalidValue, match=r"nothing of the device.*it knows: another x1"):
        profiles.latency("a")


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    table = written([point(1, 100)], tmp_path / "points.parquet")
    with pytest.raises(InvalidArtifact, match=r"profile: .*gone\.parquet"):
        Profiles(tmp_path / "gone.parquet")
    with pytest.raises(InvalidArtifact, match=r"estimator: .*gone\.npz"):
        Profiles(table, tmp_path / "gone.npz")
    with pytest.raises(NotFound, match=r"no measurements of 'b' \(there are: default/a\)"):
        Profiles(table).latency("b")
    with pytest.raises(NotFound, match=r"on 'cpu:7' \(there are: cpu:0\)"):
        Profiles(table).latency("a", "cpu:7")
    table.write_bytes(b"torn")
    with pytest.raises(InvalidArtifact, match=r"points\.parquet"):
        Profiles(table)


def test_batches_vary_as_the_measured_ones_did() -> None:
    factors = factors_of(point(1, 100, gpu=10.0))
    assert statistics.fmean(factors) == pytest.approx(1.0)
    assert np.percentile(factors, (50, 95, 99)) == pytest.approx([0.98, 1.2, 1.5], rel=0.03)


@given(st.floats(0.1, 1000), st.floats(0, 50), st.floats(0.5, 1.5), st.floats(1, 4), st.floats(1, 4))
def test_factors_are_one_on_average_whatever_was_measured(run: float, way: float, p50: float, p95: float, p99: float) -> None:
    middle = p50 * run
    changes = {"service_mean_ms": run + way, "service_p50_ms": middle + way, "service_p95_ms": middle * p95 + way}
    factors = factors_of(point(1, 100, gpu=run, service_p99_ms=middle * p95 * p99 + way, **changes))
    assert statistics.fmean(factors) == pytest.approx(1.0)
    assert 0 < factors[0] <= factors[-1]
    assert list(factors) == sorted(factors)


def test_few_samples_know_no_spread_and_the_nearest_point_that_does_lends_its_own(tmp_path: Path) -> None:
    points = [point(1, 100, samples=4, service_p99_ms=99.0), point(4, 100)]
    assert Profiles(written(points, tmp_path / "points.parquet")).latency("a").factors(1, 100) == factors_of(points[1])
    assert Profiles(written(points[:1], tmp_path / "few.parquet")).latency("a").factors(1, 100) == ()


def test_draws_are_the_seeds_own_and_their_mean_is_that_of_the_table(tmp_path: Path) -> None:
    latencies = {"a": Profiles(written([point(1, 100)], tmp_path / "points.parquet")).latency("a"), "law": Law(1.0, 2.0)}
    first, again, other = ([draws.run_ns("a", 1, 100) for _ in range(4000)] for draws in (Draws(latencies, seed) for seed in (1, 1, 2)))
    assert first == again != other
    assert statistics.fmean(first) == pytest.approx(RunTimes(latencies).run_ns("a", 1, 100), rel=0.02)
    assert len(set(first)) > 100
    assert len({Draws(latencies, seed).run_ns("law", 1, 100) for seed in range(20)}) == 1


def test_another_place_is_slower_by_a_factor_and_varies_alike(tmp_path: Path) -> None:
    latency = Profiles(written([point(1, 100)], tmp_path / "points.parquet")).latency("a")
    scaled = Scaled(latency, 1.5)
    assert scaled.run_ms(1, 100) == pytest.approx(6.0)
    assert scaled.factors(1, 100) == latency.factors(1, 100)
    assert Scaled(Law(1.0, 2.0), 2.0).factors(1, 100) == ()
