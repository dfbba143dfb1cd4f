"""Spans and log lines of requests: what they say, whose trace they continue, and that there are none unless asked for."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import grpc
import pytest
from kserve.protocol.grpc import grpc_predict_v2_pb2 as pb
from kserve.protocol.grpc.grpc_predict_v2_pb2_grpc import GRPCInferenceServiceStub
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from contracts.units import MS, S
from predictor.dispatch import Outcome
from predictor.front import Finished
from predictor.logs import access_log
from predictor.protocols.tracing import spans
from tests.predictor.fake_agent import FakeAgent, info
from tests.predictor.front_process import Front

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"


def finished(headers: Iterable[tuple[Any, Any]] = (), kind: str = "ok") -> Finished:
    end_ns = time.monotonic_ns()
    outcome = Outcome(1 * MS, 2 * MS, 3 * MS, cold=True, device="cpu:0", batch=7, row=0, rows=4) if kind == "ok" else None
    return Finished("double", "default/double", kind, outcome, end_ns - 10 * MS, end_ns, headers)


def recorded(*requests: Finished) -> list[Any]:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    record = spans(provider.get_tracer("test"))
    for request in requests:
        record(request)
    return list(exporter.get_finished_spans())


def test_a_span_has_the_times_of_its_request() -> None:
    (span,) = recorded(finished())
    assert span.name == "infer double"
    assert span.end_time - span.start_time == 10 * MS
    assert abs(span.end_time - time.time_ns()) < 3600 * S
    assert dict(span.attributes) == {
        "sluice.function": "default/double",
        "sluice.outcome": "ok",
        "sluice.queue_ms": 1.0,
        "sluice.swap_ms": 2.0,
        "sluice.run_ms": 3.0,
        "sluice.cold": True,
        "sluice.device": "cpu:0",
        "sluice.batch_rows": 4,
    }
    assert span.status.is_unset
    assert span.parent is None


def test_a_request_that_failed_says_so() -> None:
    (span,) = recorded(finished(kind="DeadlineExceeded"))
    assert (span.status.is_ok, span.status.description) == (False, "DeadlineExceeded")


HEADERS = {
    "of HTTP": [(b"host", b"x"), (b"traceparent", TRACEPARENT.encode()), (b"tracestate", b"a=b")],
    "of gRPC": [("user-agent", "x"), ("traceparent", TRACEPARENT), ("tracestate", "a=b"), ("some-bin", b"\xff")],
}


@pytest.mark.parametrize("headers", HEADERS.values(), ids=HEADERS)
def test_a_span_continues_its_callers_trace(headers: list[tuple[Any, Any]]) -> None:
    (span,) = recorded(finished(headers))
    assert f"{span.context.trace_id:032x}" == TRACE
    assert f"{span.parent.span_id:016x}" == PARENT
    assert span.context.trace_state["a"] == "b"


@pytest.mark.parametrize("value", [b"", b"nonsense", b"00-0-0-00", b"\xff\xfe", TRACEPARENT.encode() * 100])
def test_a_context_that_is_none_begins_a_trace(value: bytes) -> None:
    (span,) = recorded(finished([(b"traceparent", value)]))
    assert span.parent is None


def test_the_access_log_writes_no_more_lines_than_it_may_and_says_what_it_left_out(caplog: pytest.LogCaptureFixture) -> None:
    now_ns = 0
    write = access_log(2, lambda: now_ns)
    with caplog.at_level(logging.INFO, "sluice.access"):
        for _ in range(100):
            write(finished([(b"traceparent", TRACEPARENT.encode())]))
        now_ns = 1 * S
        write(finished(kind="Refused"))
    lines = [record.fields for record in caplog.records]  # type: ignore[attr-defined]
    assert lines[0] == {
        "function": "default/double",
        "outcome": "ok",
        "total_ms": 10.0,
        "queue_ms": 1.0,
        "swap_ms": 2.0,
        "run_ms": 3.0,
        "trace_id": TRACE,
    }
    assert lines[1:] == [lines[0], {"function": "default/double", "outcome": "Refused", "total_ms": 10.0, "skipped": 98}]


def test_a_server_that_is_asked_to_writes_a_span_and_a_line_for_each_request(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    agent = FakeAgent(tmp_path / "agent.sock", info("double"))
    agent.start()
    front = Front(agent.path, "--grpc-port", "0", "--traces", "console", "--access-log", "1000", "--log-format", "json").ready("double")
    assert front.predict("double", [1, 2, 3, 4], traceparent=TRACEPARENT).status_code == 200
    request = pb.ModelInferRequest(model_name="double", raw_input_contents=[b"\0" * 16])
    request.inputs.add(name="x", datatype="FP32", shape=[1, 4])
    with grpc.insecure_channel(front.grpc_address) as channel:
        GRPCInferenceServiceStub(channel).ModelInfer(request, metadata=[("traceparent", TRACEPARENT)])
    assert front.predict("double", [1]).status_code == 400
    assert front.stop() == 0
    agent.kill()
    lines = [json.loads(line) for line in front.log.splitlines()]
    assert [(line["outcome"], line.get("trace_id")) for line in lines if line["logger"] == "sluice.access"] == [
        ("ok", TRACE),
        ("ok", TRACE),
        ("InvalidTensor", None),
    ]
    written = capfd.readouterr().out
    assert written.count('"name": "infer double"') == 3
    assert written.count(f'"trace_id": "0x{TRACE}"') == 2


def test_an_exporter_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"there is no such exporter here, only .*console.*got 'nowhere'"):
        Front(tmp_path / "agent.sock", "--traces", "nowhere")


def test_by_default_requests_leave_no_line(tmp_path: Path) -> None:
    agent = FakeAgent(tmp_path / "agent.sock", info("double"))
    agent.start()
    front = Front(agent.path).ready("double")
    before = front.log
    for _ in range(20):
        assert front.predict("double", [1, 2, 3, 4]).status_code == 200
    assert front.log == before
    assert front.stop() == 0
    agent.kill()
