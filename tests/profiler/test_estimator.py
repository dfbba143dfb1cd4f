import os
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contracts.errors import InvalidArtifact, InvalidValue
from profiler.estimator import Estimator, ModelEstimate, ModelSamples
from profiler.v100 import read

V100 = Path(os.environ.get("SLUICE_DATA", Path(__file__).parents[3] / "shared" / "data")) / "v100-latency"
published = pytest.mark.skipif(not V100.is_dir(), reason="the published V100 measurements are not here (SLUICE_DATA)")
BATCH, SM, QUOTA = (1.0, 2.0, 4.0, 8.0), (10.0, 25.0, 50.0, 75.0, 100.0), (10.0, 25.0, 50.0, 100.0)
ROWS = np.stack([axis.ravel() for axis in np.meshgrid(BATCH, SM, QUOTA, indexing="ij")], axis=-1)


def gated(rows: np.ndarray, work_ms: float, launch_ms: float) -> np.ndarray:
    """A device whose quota gates launches, not kernels: the slower of roofline and host."""
    batch, sm, quota = rows.T
    return np.maximum(work_ms * np.maximum(batch * 100 / sm, 2.0), launch_ms * (100 / quota) ** 1.1)


def metered(rows: np.ndarray, work_ms: float, floor_ms: float) -> np.ndarray:
    """A device that charges its time to the quota, as the CPU device does."""
    batch, sm, quota = rows.T
    return (floor_ms + work_ms * batch**0.9) * 100 / sm * 100 / quota


def samples(name: str, rows: np.ndarray, latency_ms: np.ndarray, device: str = "d") -> ModelSamples:
    return ModelSamples(name, device, rows[:, 0], rows[:, 1], rows[:, 2], latency_ms)


def population(law, count: int, seed: int, noise: float = 0.02) -> list[ModelSamples]:
    random = np.random.default_rng(seed)
    found = []
    for index in range(count):
        true = law(ROWS, *np.exp(random.uniform(-1, 2, 2)))
        found.append(samples(f"m{index}", ROWS, true * np.exp(noise * random.normal(size=len(ROWS)))))
    return found


def probed(estimator: Estimator, true_ms: np.ndarray, count: int, device: str = "d") -> tuple[ModelEstimate, list[int]]:
    chosen: list[int] = []
    for _ in range(count):
        estimate = estimator.condition(samples("new", ROWS[chosen], true_ms[chosen], device))
        chosen.append(estimate.next_probe(*ROWS.T))
    return estimator.condition(samples("new", ROWS[chosen], true_ms[chosen], device)), chosen


def mape(estimate: ModelEstimate, true_ms: np.ndarray, chosen: list[int]) -> float:
    rest = np.setdiff1d(np.arange(len(ROWS)), chosen)
    return float(np.mean(np.abs(estimate.predict(*ROWS[rest].T).mean_ms / true_ms[rest] - 1)))


@pytest.fixture(scope="module")
def trained() -> Estimator:
    return Estimator.fit(population(gated, 8, seed=1))


LAWS = {"launches gated by the quota": (gated, 3.0, 2.0), "device time charged to the quota": (metered, 3.0, 2.0), "no floor": (metered, 0.7, 0.0)}


@pytest.mark.parametrize(("law", "work", "floor"), LAWS.values(), ids=LAWS.keys())
def test_physics_and_sixteen_probes_do_without_a_population(law, work, floor):
    true = law(ROWS, work, floor)
    estimate, chosen = probed(Estimator(), true, 16)
    assert mape(estimate, true, chosen) < 0.10


@pytest.mark.parametrize("law", [gated, metered])
@pytest.mark.parametrize("models", [1, 3, 8])
def test_a_population_of_any_size_predicts_the_next_model_from_eight_probes(law, models):
    true = law(ROWS, 2.2, 1.3)
    estimate, chosen = probed(Estimator.fit(population(law, models, seed=models)), true, 8)
    assert mape(estimate, true, chosen) < 0.10


def test_more_probes_leave_less_uncertainty(trained):
    true = gated(ROWS, 2.0, 3.0)
    errors = [probed(trained, true, count)[0].expected_error() for count in (0, 1, 4, 12)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.05 < errors[0]


def test_probes_are_not_repeated_while_others_are_left(trained):
    true = gated(ROWS, 2.0, 3.0)
    _, chosen = probed(trained, true, 20)
    assert len(set(chosen)) == 20


def test_the_only_candidate_is_chosen_though_it_was_measured(trained):
    estimate = trained.condition(samples("new", ROWS[:1], np.array([50.0])))
    assert estimate.next_probe(*ROWS[:1].T) == 0


def test_intervals_hold_nine_of_ten_measurements_of_models_that_were_not_trained_on(trained):
    random = np.random.default_rng(5)
    inside = []
    for _ in range(6):
        true = gated(ROWS, *np.exp(random.uniform(-1, 2, 2))) * np.exp(0.02 * random.normal(size=len(ROWS)))
        estimate, chosen = probed(trained, true, 10)
        rest = np.setdiff1d(np.arange(len(ROWS)), chosen)
        found = estimate.predict(*ROWS[rest].T)
        inside.append(np.mean((found.low_ms <= true[rest]) & (true[rest] <= found.high_ms)))
    assert np.mean(inside) > 0.85


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(0, 25), batch=st.floats(1, 64))
def test_more_of_a_share_is_never_slower_whatever_was_measured(trained, seed, count, batch):
    random = np.random.default_rng(seed)
    rows = ROWS[random.integers(0, len(ROWS), count)]
    estimate = trained.condition(samples("noise", rows, np.exp(random.normal(2, 2, count))))
    levels = np.unique(np.concatenate([random.uniform(0.01, 100, 25), SM, [100.0]]))
    sm, quota = (axis.ravel() for axis in np.meshgrid(levels, levels, indexing="ij"))
    found = estimate.predict(batch, sm, quota)
    for line in (found.low_ms, found.mean_ms, found.high_ms):
        square = np.log(line).reshape(len(levels), -1)
        assert np.diff(square, axis=0).max() <= 1e-9
        assert np.diff(square, axis=1).max() <= 1e-9
    assert (found.low_ms <= found.mean_ms).all()
    assert (found.mean_ms <= found.high_ms).all()


def test_one_outlier_among_probes_does_not_carry_the_estimate_away(trained):
    true = gated(ROWS, 2.0, 3.0)
    _, chosen = probed(trained, true, 16)
    seen = true[chosen].copy()
    seen[7] *= 20
    spoilt = trained.condition(samples("new", ROWS[chosen], seen))
    assert mape(spoilt, true, chosen) < 0.15


def test_an_unsure_measurement_counts_less_and_leaves_wider_intervals():
    true = metered(ROWS, 3.0, 2.0)
    rows, seen = ROWS[::5], true[::5].copy()
    seen[3] *= 1.3
    unsure = np.where(np.arange(len(rows)) == 3, 0.3, 0.01)
    known, guessed = (Estimator().condition(ModelSamples("m", "d", *rows.T, seen, spread=spread)) for spread in (unsure, ()))
    assert mape(known, true, []) < mape(guessed, true, [])
    sure, less = (Estimator().condition(ModelSamples("m", "d", *rows.T, true[::5], spread=np.full(len(rows), spread))) for spread in (0.001, 0.1))
    widths = [np.log(found.high_ms / found.low_ms) for found in (sure.predict(*ROWS.T), less.predict(*ROWS.T))]
    assert (widths[0] < widths[1]).all()


def test_shares_below_the_measured_ones_take_longer_as_the_inverse(trained):
    estimate = trained.condition(samples("new", ROWS, gated(ROWS, 2.0, 3.0)))
    tenth, hundredth = estimate.predict([4, 4], [50, 50], [10, 1]).mean_ms
    assert hundredth == pytest.approx(10 * tenth)


def test_a_saved_estimator_says_the_same(trained, tmp_path):
    trained.save(tmp_path / "estimator.npz")
    again = Estimator.load(tmp_path / "estimator.npz")
    probes = samples("new", ROWS[::9], gated(ROWS[::9], 2.0, 3.0))
    for left, right in zip(trained.condition(probes).predict(*ROWS.T).lines(), again.condition(probes).predict(*ROWS.T).lines(), strict=True):
        np.testing.assert_array_equal(left, right)
    assert again.summary == trained.summary
    assert [path.name for path in tmp_path.iterdir()] == ["estimator.npz"]


def test_the_file_says_what_it_was_trained_on(trained):
    assert trained.summary["devices"]["d"]["models"] == [f"m{index}" for index in range(8)]
    assert trained.summary["devices"]["d"]["points"] == 8 * len(ROWS)
    assert len(trained.summary["dataset"]) == 64
    assert Estimator.fit(population(gated, 8, seed=1)).summary["dataset"] == trained.summary["dataset"]
    assert "numpy" in trained.summary["versions"]


def torn(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(bytes(data))


def other_version(path: Path) -> None:
    Estimator({}, {}).save(path)
    with np.load(path) as file:
        header = file["header"].tobytes().replace(b'"version": 2', b'"version": 9')
    np.savez(path, header=np.frombuffer(header, dtype=np.uint8))


def pickled(path: Path) -> None:
    np.savez(path, header=np.array([{"version": 1}], dtype=object))


def wrong_shape(path: Path) -> None:
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    arrays["0.mean"] = arrays["0.mean"][:-1]
    np.savez(path, **arrays)


def not_a_number(path: Path) -> None:
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    arrays["0.covariance"][3, 3] = np.nan
    np.savez(path, **arrays)


SPOILT = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("no estimator"),
    "torn": torn,
    "a flipped byte": flipped,
    "another version": other_version,
    "pickled objects": pickled,
    "an empty archive": lambda path: zipfile.ZipFile(path, "w").close(),
    "one bare array": lambda path: path.write_bytes(b"\x93NUMPY" + struct.pack("<BBH", 1, 0, 0)),
    "arrays that do not fit each other": wrong_shape,
    "a value that is no number": not_a_number,
}


@pytest.mark.parametrize("spoil", SPOILT.values(), ids=SPOILT.keys())
def test_a_file_that_is_no_estimator_is_named(spoil, trained, tmp_path):
    path = tmp_path / "estimator.npz"
    trained.save(path)
    spoil(path)
    with pytest.raises(InvalidArtifact, match=r"estimator\.npz"):
        Estimator.load(path)


BAD = {
    "a latency that is no number": ({"latency_ms": [np.nan]}, "latency_ms"),
    "a negative latency": ({"latency_ms": [-1.0]}, "latency_ms"),
    "no latency of zero": ({"latency_ms": [0.0]}, "latency_ms"),
    "too few latencies": ({"latency_ms": []}, "1 configurations need as many latencies"),
    "a batch of none": ({"batch": [0]}, "batch"),
    "a share above the whole": ({"sm_percent": [101]}, "sm_percent"),
    "a quota of zero": ({"quota_percent": [0]}, "quota_percent"),
    "an endless quota": ({"quota_percent": [np.inf]}, "quota_percent"),
    "words": ({"batch": ["many"]}, "must be numbers"),
    "too many spreads": ({"spread": [0.1, 0.1]}, "a spread of 0 or more for each latency"),
    "a negative spread": ({"spread": [-0.1]}, "a spread of 0 or more for each latency"),
    "different lengths": ({"batch": [1, 2, 3], "sm_percent": [50, 60]}, "of one length"),
}


@pytest.mark.parametrize(("change", "words"), BAD.values(), ids=BAD.keys())
def test_wrong_measurements_are_refused_by_the_models_name(change, words):
    wrong = ModelSamples("resnet", "d", **({"batch": [1], "sm_percent": [50], "quota_percent": [50], "latency_ms": [3.0]} | change))
    for use in (lambda: Estimator.fit([wrong]), lambda: Estimator().condition(wrong)):
        with pytest.raises(InvalidValue, match="'resnet'") as caught:
            use()
        assert words in str(caught.value)


def test_nothing_to_learn_from_is_refused():
    with pytest.raises(InvalidValue, match="nothing to learn from"):
        Estimator.fit([])
    with pytest.raises(InvalidValue, match="'empty' has no measurements"):
        Estimator.fit([ModelSamples("empty", "d")])


@pytest.mark.parametrize(("kind", "power"), [(0.0, 1.1), (1.0, 1.7)])
def test_a_model_is_expected_to_behave_like_those_whose_graphs_are_like_its_own(kind, power):
    def launched(launch_ms: float, power: float) -> np.ndarray:
        batch, sm, quota = ROWS.T
        return np.maximum(0.2 * batch * 100 / sm, launch_ms * (100 / quota) ** power)

    measured = [(of_kind, of_power, launch_ms) for of_kind, of_power in ((0.0, 1.1), (1.0, 1.7)) for launch_ms in (1.0, 2.0, 3.0, 4.0)]
    estimator = Estimator.fit(
        [ModelSamples(f"{each}", "d", *ROWS.T, launched(each[2], each[1]), features=[each[0], each[2] / 100]) for each in measured]
    )
    probe = ModelSamples("new", "d", [2, 8], [100, 10], [100, 100], [2.5, 16], features=[kind, 0.025])
    slower = estimator.condition(probe).predict(2, 100, 10).mean_ms[0] / 2.5
    unlike = {1.1: 10**1.7, 1.7: 10**1.1}[power]
    assert abs(np.log(slower / 10**power)) < abs(np.log(slower / unlike))


def test_devices_are_learnt_apart():
    estimator = Estimator.fit([*population(gated, 4, seed=2), *(samples(f"c{i}", ROWS, metered(ROWS, 1.0 + i, 0.5), "cpu") for i in range(4))])
    true = metered(ROWS, 2.5, 0.7)
    estimate, chosen = probed(estimator, true, 6, device="cpu")
    assert mape(estimate, true, chosen) < 0.06


@pytest.mark.slow
@published
def test_six_of_the_published_models_are_predicted_from_sixteen_probes_each():
    everything = read(V100)
    assert len(everything) == 60
    test, train = everything[4::10], [model for index, model in enumerate(everything) if index % 4 == 1 and index % 10 != 4]
    estimator = Estimator.fit(train)
    errors = []
    for model in test:
        rows, true = model.rows(), np.exp(model.log_latency())
        chosen: list[int] = []
        for _ in range(16):
            estimate = estimator.condition(samples(model.name, rows[chosen], true[chosen], model.device))
            chosen.append(estimate.next_probe(*rows.T))
        estimate = estimator.condition(samples(model.name, rows[chosen], true[chosen], model.device))
        rest = np.setdiff1d(np.arange(len(rows)), chosen)
        errors.append(np.mean(np.abs(estimate.predict(*rows[rest].T).mean_ms / true[rest] - 1)))
    assert np.mean(errors) < 0.12
