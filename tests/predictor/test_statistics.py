"""Triton's statistics: the sums themselves, and that they are the numbers that Prometheus shows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import json_format

from contracts.units import S
from predictor.protocols import management_pb2 as pb
from predictor.protocols.management import SERVICE
from predictor.statistics import Statistics
from tests.predictor.fake_agent import FakeAgent, info
from tests.predictor.front_process import Front


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeAgent]:
    agent = FakeAgent(Path(tmp_path_factory.mktemp("run")) / "agent.sock", info("double"), info("loading", state="loading"))
    agent.start()
    yield agent
    agent.kill()


@pytest.fixture(scope="module")
def front(agent: FakeAgent) -> Iterator[Front]:
    front = Front(agent.path, "--grpc-port", "0").ready("double")
    yield front
    assert front.stop() == 0, front.log


def test_batches_are_counted_by_their_rows() -> None:
    statistics = Statistics()
    for rows, run_ns in ((4, 30), (1, 10), (4, 50)):
        statistics.ran(rows, run_ns)
    shown = statistics.to_dict()
    assert shown["execution_count"] == 3
    none = {"count": 0, "ns": 0}
    assert shown["batch_stats"] == [
        {"batch_size": 1, "compute_input": none, "compute_infer": {"count": 1, "ns": 10}, "compute_output": none},
        {"batch_size": 4, "compute_input": none, "compute_infer": {"count": 2, "ns": 80}, "compute_output": none},
    ]


def test_tritons_message_has_a_field_for_all_but_the_swap() -> None:
    shown = Statistics().to_dict()
    message = json_format.ParseDict(shown, pb.ModelStatistics(), ignore_unknown_fields=True)
    back = json_format.MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
    assert shown["inference_stats"].keys() - back["inference_stats"].keys() == {"swap"}  # type: ignore[attr-defined]
    assert shown.keys() <= back.keys()


def one(front: Front, path: str = "/v2/models/double/stats") -> Any:
    (found,) = (model for model in front.http.get(path).json()["model_stats"] if model["name"] == "double")
    return found


def test_they_are_what_prometheus_shows(front: Front) -> None:
    for rows in (1, 3):
        assert front.predict("double", *[[1, 2, 3, 4]] * rows).status_code == 200
    assert front.predict("double", [1]).status_code == 400
    assert front.predict("double", [13, 0, 0, 0]).status_code == 500
    found = one(front)
    assert (found["inference_count"], found["execution_count"]) == (4, 2)
    assert [(batch["batch_size"], batch["compute_infer"]) for batch in found["batch_stats"]] == [
        (1, {"count": 1, "ns": 3_000_000}),
        (3, {"count": 1, "ns": 3_000_000}),
    ]
    sums = found["inference_stats"]
    assert sums["swap"] == {"count": 2, "ns": 4_000_000}
    assert sums["fail"]["count"] == 2
    label = {"function": "default/double"}
    for name, metric in (("success", "request"), ("queue", "queue"), ("swap", "swap"), ("compute_infer", "run")):
        assert sums[name]["count"] == front.metric(f"sluice_{metric}_seconds_count", **label)
        assert sums[name]["ns"] / S == pytest.approx(front.metric(f"sluice_{metric}_seconds_sum", **label))
    assert 0 < sums["compute_input"]["ns"] + sums["compute_output"]["ns"] < sums["success"]["ns"]
    assert found["last_inference"] > 1_700_000_000_000


def test_every_way_to_ask_gives_the_same(front: Front) -> None:
    assert one(front) == one(front, "/v2/models/stats") == one(front, "/v2/models/double/versions/1/stats")
    assert {model["name"] for model in front.http.get("/v2/models/stats").json()["model_stats"]} == {"double", "loading"}
    with grpc.insecure_channel(front.grpc_address) as channel:
        ask = channel.unary_unary(f"/{SERVICE}/ModelStatistics", pb.ModelRequest.SerializeToString, pb.ModelStatisticsResponse.FromString)
        (message,) = ask(pb.ModelRequest(name="double", version="1"), timeout=60).model_stats
        assert len(ask(pb.ModelRequest(), timeout=60).model_stats) == 2
    assert message.inference_stats.queue.ns == one(front)["inference_stats"]["queue"]["ns"]
    assert [batch.batch_size for batch in message.batch_stats] == [batch["batch_size"] for batch in one(front)["batch_stats"]]
