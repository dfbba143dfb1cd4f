"""Documents of any runtime as functions to plan for, and what is known of their models at three levels."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest

from contracts.errors import InvalidFunction
from contracts.functions import FunctionClass, Slo
from contracts.units import MIB, MS
from simulator.latency import Law
from simulator.planning.wanted import LEVELS, Known, declared, of_range, wanted

DOCUMENT: dict[str, Any] = {
    "apiVersion": "serving.kserve.io/v1beta1",
    "kind": "InferenceService",
    "metadata": {"name": "vision", "namespace": "team", "annotations": {"sluice.dev/slo-latency-ms": "80", "other.dev/x": "y"}},
    "spec": {"predictor": {"minReplicas": 2, "model": {"modelFormat": {"name": "onnx"}, "resources": {"limits": {"nvidia.com/gpu": "1"}}}}},
    "status": {"url": "http://x"},
}


def with_predictor(**parts: object) -> dict[str, Any]:
    document = copy.deepcopy(DOCUMENT)
    document["spec"]["predictor"] = parts
    return document


def test_a_document_of_another_runtime_is_a_function() -> None:
    found = declared(DOCUMENT)
    assert (found.function.key, found.replicas, found.gpus) == ("team/vision", 2, 1)
    assert found.function.slo == Slo(80 * MS, 98.0)


@pytest.mark.parametrize(
    ("predictor", "replicas", "gpus"),
    [
        ({"pytorch": {"storageUri": "s3://x"}}, 1, 1),
        ({"minReplicas": 0, "model": {"resources": {"requests": {"nvidia.com/gpu": 2}}}}, 0, 2),
        ({"containers": [{"resources": {"limits": {"nvidia.com/gpu": "1", "cpu": "2"}}}, {"resources": {"limits": {"cpu": "1"}}}]}, 1, 1),
        ({"model": {"resources": {"limits": {"nvidia.com/gpu": "4"}, "requests": {"nvidia.com/gpu": "4"}}}, "workerSpec": {}}, 1, 4),
    ],
    ids=["nothing said", "scaled to zero", "containers", "limits and requests are the same GPUs"],
)
def test_replicas_and_gpus(predictor: dict[str, Any], replicas: int, gpus: int) -> None:
    found = declared(with_predictor(**predictor))
    assert (found.replicas, found.gpus) == (replicas, gpus)


def changed(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    document = copy.deepcopy(DOCUMENT)
    change(document)
    return document


@pytest.mark.parametrize(
    ("document", "named"),
    [
        (None, "apiVersion"),
        ([], "apiVersion"),
        (changed(lambda one: one.update(kind="Pod")), "InferenceService"),
        (changed(lambda one: one.update(spec={})), r"spec\.predictor"),
        (changed(lambda one: one["metadata"].update(name="A b")), r"metadata\.name"),
        (changed(lambda one: one["metadata"]["annotations"].update({"sluice.dev/spam": "1"})), r"sluice\.dev/spam"),
        (changed(lambda one: one["metadata"]["annotations"].update({"sluice.dev/slo-latency-ms": "-1"})), r"sluice\.dev/slo-latency-ms"),
        (with_predictor(minReplicas=-1), r"minReplicas.*-1"),
        (with_predictor(minReplicas="2"), r"minReplicas.*'2'"),
    ],
)
def test_what_is_wrong_is_named_with_its_key(document: object, named: str) -> None:
    with pytest.raises(InvalidFunction, match=named):
        declared(document)


def known(law: Law) -> Known:
    return Known(MIB, dict.fromkeys(LEVELS, law), "a test")


@pytest.mark.parametrize(
    ("law", "sm"),
    [(Law(0, 10), 100), (Law(10, 0), 25), (Law(0, 10, needs_sm=5), 50), (Law(0, 10, needs_sm=30), 100)],
    ids=["a row fills the device", "nothing but launches", "eight rows fill 40 %", "eight rows fill it"],
)
def test_the_share_is_what_a_full_batch_can_use(law: Law, sm: int) -> None:
    assert wanted(declared(DOCUMENT), known(law)).function.share.sm_percent == sm


def test_an_objective_given_beside_the_document_counts() -> None:
    assert wanted(declared(DOCUMENT), known(Law(0, 10)), slo_ms=33).function.slo == Slo(33 * MS, 98.0)


def test_best_effort_is_told_from_the_annotation() -> None:
    document = changed(lambda one: one["metadata"]["annotations"].update({"sluice.dev/class": "best-effort"}))
    one = wanted(declared(document), known(Law(0, 10)))
    assert one.function.cls is FunctionClass.BEST_EFFORT
    assert not one.guaranteed


def test_a_range_has_its_middle_and_its_ends() -> None:
    found = of_range(10, 30, MIB, "told")
    assert [found.times[level].run_ms(2, 50) for level in LEVELS] == [40, 80, 120]
    assert of_range(10, 30, MIB, "told", 11).times["mean"].run_ms(1, 100) == 11


class Ends:
    """A latency that varies by a tenth, at its level."""

    def __init__(self, level: str) -> None:
        self._ms = {"low": 9.0, "mean": 8.0, "high": 20.0}[level]

    def run_ms(self, rows: int, sm_percent: int) -> float:
        return self._ms * rows**0.5 * 100 / sm_percent

    def factors(self, rows: int, sm_percent: int) -> tuple[float, ...]:
        return (0.9, 1.0 + rows / 100)


def test_times_are_read_once_for_the_share_and_keep_their_order_and_spread() -> None:
    one = wanted(declared(DOCUMENT), Known(MIB, {level: Ends(level) for level in LEVELS}, "a test"))
    sent = pickle.loads(pickle.dumps(one))

    assert one.function.share.sm_percent == 100
    # The middle of what was measured may lie below the lower end of an estimate: it does not here.
    assert [sent.run_ms(level, 4) for level in LEVELS] == pytest.approx([18, 18, 40])
    assert sent.run_ms("high", 3) == pytest.approx(20 * 3**0.5)
    assert sent.times["low"].factors(3, 100) == (0.9, 1.02)
    assert sent.work_ms("high") == pytest.approx(20 / 8**0.5)


def test_fewer_rows_are_another_function() -> None:
    one = wanted(declared(DOCUMENT), known(Law(10, 1))).batched(2)
    assert (one.function.max_batch, one.function.slo) == (2, Slo(80 * MS, 98.0))
