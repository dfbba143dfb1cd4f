import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from contracts.errors import InvalidValue
from profiler import evaluate
from profiler.estimator import Estimator, ModelSamples
from profiler.v100 import read

BATCH, SM, QUOTA = (1.0, 4.0, 8.0), (5.0, 10.0, 25.0, 50.0, 100.0), (10.0, 50.0, 100.0)
ROWS = np.stack([axis.ravel() for axis in np.meshgrid(BATCH, SM, QUOTA, indexing="ij")], axis=-1)


def model(index: int, random: np.random.Generator) -> ModelSamples:
    work, launch = np.exp(random.uniform(-1, 2, 2))
    batch, sm, quota = ROWS.T
    latency = np.maximum(work * batch * 100 / sm, launch * 100 / quota) * np.exp(0.02 * random.normal(size=len(ROWS)))
    return ModelSamples(f"m{index}", "d", batch, sm, quota, latency, features=np.log([work, launch]))


@pytest.fixture(scope="module")
def population() -> list[ModelSamples]:
    random = np.random.default_rng(4)
    return [model(index, random) for index in range(10)]


def test_every_method_stands_in_the_table_and_ours_is_never_non_monotone(population):
    told: list[str] = []
    scores = evaluate.evaluate(population, probes=(2, 8), progress=told.append, trees=20)
    assert [(score.case, score.method, score.probes) for score in scores] == [
        ("unseen configurations", "estimator", None),
        ("unseen configurations", "boosted tree", None),
        ("unseen models", "estimator", 2),
        ("unseen models", "estimator", 8),
        ("unseen models", "formula", 29),
        ("unseen models", "boosted tree", 29),
    ]
    assert all(score.models == 10 for score in scores)
    assert len(told) == 20
    ours = [score for score in scores if score.method == "estimator"]
    assert all(score.non_monotone == 0 and score.coverage is not None for score in ours)
    assert scores[3].mape < scores[2].mape
    assert scores[3].mape < 0.15


def test_no_probe_is_scored_and_every_other_configuration_is(population):
    seen = population[0]
    estimator = Estimator.fit(population[1:4])
    for count, _, rest in evaluate.probe(estimator, seen, (0, 3, 6)):
        assert len(rest.rows()) == len(seen.rows()) - count


def test_a_test_models_own_rows_change_nothing_but_its_probes(population):
    """Leakage would show: with other values outside the probes, the prediction stays what it was."""
    seen = population[0]
    estimator = Estimator.fit(population[1:5])
    _, before, rest = next(iter(evaluate.probe(estimator, seen, (4,))))
    hidden = {tuple(row) for row in rest.rows().tolist()}
    spoilt = np.where([tuple(row) in hidden for row in seen.rows().tolist()], 12345.0, np.exp(seen.log_latency()))
    _, after, _ = next(iter(evaluate.probe(estimator, ModelSamples("m0", "d", *ROWS.T, spoilt, seen.features), (4,))))
    np.testing.assert_array_equal(before.predict(*ROWS.T).mean_ms, after.predict(*ROWS.T).mean_ms)


def test_too_few_models_for_the_folds_are_refused(population):
    with pytest.raises(InvalidValue, match="at least 10 models"):
        evaluate.unseen_models(population[:9])


def write(folder: Path, rows: str, graphs: str) -> None:
    (folder / "latency.csv.gz").write_bytes(gzip.compress(rows.encode()))
    (folder / "graphs.jsonl.gz").write_bytes(gzip.compress(graphs.encode()))


HEAD = "model,batch,sm_percent,quota_percent,latency_ms\n"
OPERATOR = {"op": "nn.dense", "attr": [], "shape": [4, 4]}
GRAPH = json.dumps({"model": "a", "batch": 1, "gmacs": 0.1, "convs": 0, "denses": 1, "relus": 0, "ops": [OPERATOR]})


def test_the_published_form_is_read(tmp_path):
    write(tmp_path, HEAD + "b,1,50,100,3.5\na,2,100,10,7\na,1,100,10,6\n", GRAPH)
    first, second = read(tmp_path)
    assert (first.name, second.name) == ("a", "b")
    assert first.rows().tolist() == [[2, 100, 10], [1, 100, 10]]
    np.testing.assert_allclose(np.exp(first.log_latency()), [7, 6])
    assert first.features is not None
    assert second.features is None


TORN = {
    "no rows": (HEAD, GRAPH, "holds no measurements"),
    "no such column": ("model,batch\na,1\n", GRAPH, "KeyError"),
    "a word for a number": (HEAD + "a,1,50,100,fast\n", GRAPH, "fast"),
    "graphs that are no JSON": (HEAD + "a,1,50,100,3\n", "{", "graphs.jsonl.gz"),
}


@pytest.mark.parametrize(("rows", "graphs", "words"), TORN.values(), ids=TORN.keys())
def test_torn_data_is_named(rows, graphs, words, tmp_path):
    write(tmp_path, rows, graphs)
    with pytest.raises(InvalidValue, match=words):
        read(tmp_path)


def test_a_torn_archive_and_a_missing_file_are_named(tmp_path):
    with pytest.raises(InvalidValue, match=r"latency\.csv\.gz"):
        read(tmp_path)
    write(tmp_path, HEAD + "a,1,50,100,3\n" * 500, GRAPH)
    data = (tmp_path / "latency.csv.gz").read_bytes()
    (tmp_path / "latency.csv.gz").write_bytes(data[:-12])
    with pytest.raises(InvalidValue, match=r"latency\.csv\.gz"):
        read(tmp_path)
