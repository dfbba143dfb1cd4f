"""The protocols beside JSON over HTTP: gRPC through KServe's own client stubs, and the binary bodies that KServe's client sends."""

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from kserve import InferInput, InferRequest, InferResponse
from kserve.protocol.grpc import grpc_predict_v2_pb2 as pb
from kserve.protocol.grpc.grpc_predict_v2_pb2_grpc import GRPCInferenceServiceStub

from contracts.errors import Refused
from tests.predictor.fake_agent import ALONE, PAIR, SAME, FakeAgent, info
from tests.predictor.front_process import Front


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeAgent]:
    path: Path = tmp_path_factory.mktemp("run") / "agent.sock"
    agent = FakeAgent(path, info("double"), info("pair", PAIR), info("alone", ALONE), info("same", SAME), info("loading", state="loading"))
    agent.start()
    yield agent
    agent.kill()


@pytest.fixture(scope="module")
def front(agent: FakeAgent) -> Iterator[Front]:
    front = Front(agent.path, "--grpc-port", "0").ready("double", "pair")
    yield front
    assert front.metric("sluice_segment_used_bytes") == 0
    assert front.stop() == 0, front.log


@pytest.fixture(scope="module")
def stub(front: Front) -> Iterator[Any]:
    port = front.log.split("serving gRPC on 127.0.0.1:")[1].split()[0]
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield GRPCInferenceServiceStub(channel)


def raw(values: Any, name: str = "double", datatype: str = "FP32") -> pb.ModelInferRequest:
    array = np.asarray(values, np.float32)
    request = pb.ModelInferRequest(model_name=name, id="7", raw_input_contents=[array.tobytes()])
    request.inputs.add(name="x", datatype=datatype, shape=array.shape)
    return request


def test_grpc_takes_raw_bytes_and_gives_raw_bytes_with_timing(stub: Any) -> None:
    response = stub.ModelInfer(raw([[1, 2, 3, float("inf")]]))
    assert (response.id, response.model_name) == ("7", "double")
    assert np.frombuffer(response.raw_output_contents[0], np.float32).tolist() == [2, 4, 6, float("inf")]
    assert response.parameters["sluice_run_ms"].string_param == "3.0"
    assert response.parameters["sluice_batch_rows"].int64_param == 1
    assert response.parameters["sluice_cold"].bool_param is False


def test_grpc_takes_typed_contents_and_gives_the_wanted_outputs(stub: Any) -> None:
    request = pb.ModelInferRequest(model_name="pair")
    request.inputs.add(name="a", datatype="FP32", shape=[1, 2]).contents.fp32_contents.extend([1, 2])
    request.inputs.add(name="b", datatype="INT64", shape=[1, 2]).contents.int64_contents.extend([3, 4])
    request.outputs.add(name="count")
    response = stub.ModelInfer(request)
    assert [(output.name, list(output.shape)) for output in response.outputs] == [("count", [1])]
    assert np.frombuffer(response.raw_output_contents[0], np.int64).tolist() == [2]


WRONG = {
    "an unknown model": (raw([[1, 2, 3, 4]], name="nothing"), "NOT_FOUND"),
    "a wrong shape": (raw([[1, 2]]), "INVALID_ARGUMENT"),
    "a wrong datatype": (raw([[1, 2, 3, 4]], datatype="FP64"), "INVALID_ARGUMENT"),
    "a model that is loading": (raw([[1, 2, 3, 4]], name="loading"), "UNAVAILABLE"),
    "a model that fails": (raw([[13, 2, 3, 4]]), "INTERNAL"),
}


@pytest.mark.parametrize(("request_", "code"), WRONG.values(), ids=WRONG)
def test_grpc_codes(stub: Any, request_: pb.ModelInferRequest, code: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        stub.ModelInfer(request_)
    assert caught.value.code().name == code, caught.value.details()


def test_grpc_says_when_to_come_back(stub: Any, agent: FakeAgent) -> None:
    agent.refuse = Refused("too busy", retry_after_ms=3000)
    with pytest.raises(grpc.RpcError) as caught:
        stub.ModelInfer(raw([[1, 2, 3, 4]]))
    agent.refuse = None
    assert (caught.value.code().name, caught.value.details()) == ("RESOURCE_EXHAUSTED", "too busy")
    assert dict(caught.value.trailing_metadata())["retry-after"] == "3"


def test_the_grpc_deadline_reaches_the_agent(stub: Any, front: Front, agent: FakeAgent) -> None:
    agent.hold()
    before = len(agent.submits)

    def told() -> bool:
        """A busy machine may let the deadline pass before the agent is asked at all."""
        with pytest.raises(grpc.RpcError) as caught:
            stub.ModelInfer(raw([[1, 2, 3, 4]]), timeout=0.5)
        assert caught.value.code().name == "DEADLINE_EXCEEDED"
        return len(agent.submits) > before

    front.until(told)
    submit = agent.submits[before]
    assert submit.deadline_ns < submit.slo_deadline_ns
    agent.wait(lambda: submit.id in agent.cancels)
    agent.release()


def test_grpc_readiness_and_metadata(stub: Any) -> None:
    assert stub.ServerReady(pb.ServerReadyRequest()).ready
    assert stub.ModelReady(pb.ModelReadyRequest(name="double")).ready
    assert not stub.ModelReady(pb.ModelReadyRequest(name="loading")).ready
    metadata = stub.ModelMetadata(pb.ModelMetadataRequest(name="double"))
    assert [(one.name, one.datatype, list(one.shape)) for one in metadata.inputs] == [("x", "FP32", [-1, 4])]


def test_a_binary_body_as_kserves_client_sends_it(front: Front) -> None:
    tensor = InferInput("x", [1, 4], "FP32")
    tensor.set_data_from_numpy(np.array([[1, 2, 3, 4]], np.float32), binary_data=True)
    body, json_length = InferRequest("double", [tensor], request_id="7", parameters={"binary_data_output": True}).to_rest()
    headers = {"Inference-Header-Content-Length": str(json_length), "Content-Type": "application/octet-stream"}
    response = front.http.post("/v2/models/double/infer", content=body, headers=headers)
    assert response.status_code == 200, response.text
    found = InferResponse.from_bytes(response.content, int(response.headers["inference-header-content-length"]))
    assert found.outputs[0].as_numpy().tolist() == [[2, 4, 6, 8]]


def test_a_cloud_event_is_answered_with_one(front: Front) -> None:
    event: dict[str, Any] = {"specversion": "1.0", "id": "1", "source": "test", "type": "test", "time": "2026-01-01T00:00:00Z"}
    event["data"] = {"instances": [[1, 2, 3, 4]]}
    response = front.http.post("/v1/models/double:predict", content=json.dumps(event), headers={"Content-Type": "application/cloudevents+json"})
    assert response.json()["data"] == {"predictions": [[2, 4, 6, 8]]}, response.text


def test_binary_and_json_mix_over_http(front: Front) -> None:
    a, b = np.array([[1, 2]], np.float32), [3, 4]
    inputs = [
        {"name": "a", "shape": [1, 2], "datatype": "FP32", "parameters": {"binary_data_size": 8}},
        {"name": "b", "shape": [1, 2], "datatype": "INT64", "data": b},
    ]
    outputs = [{"name": "count"}, {"name": "sum", "parameters": {"binary_data": True}}]
    head = json.dumps({"id": "7", "inputs": inputs, "outputs": outputs, "parameters": {"mine": "kept"}}).encode()
    response = front.http.post("/v2/models/pair/infer", content=head + a.tobytes(), headers={"Inference-Header-Content-Length": str(len(head))})
    assert response.headers["content-type"] == "application/octet-stream"
    length = int(response.headers["inference-header-content-length"])
    answer = json.loads(response.content[:length])
    assert answer["outputs"][0] == {"name": "count", "shape": [1], "datatype": "INT64", "data": [2]}
    assert np.frombuffer(response.content[length:], np.float32).tolist() == [4, 6]
    assert (answer["id"], answer["parameters"]["mine"], answer["parameters"]["sluice_run_ms"]) == ("7", "kept", 3.0)


@pytest.mark.parametrize("length", ["-1", "1.5", "ten", "9" * 30, ""], ids=["negative", "a fraction", "text", "huge", "empty"])
def test_a_header_length_that_is_none(front: Front, length: str) -> None:
    response = front.http.post("/v2/models/double/infer", content=b"{}", headers={"Inference-Header-Content-Length": length})
    assert (response.status_code, "Inference-Header-Content-Length" in response.text) == (400, True)


def test_a_body_in_many_small_pieces_is_put_together(front: Front) -> None:
    body = json.dumps({"instances": [[1.5, 2, 3, 4]]}).encode()
    with socket.create_connection((httpx.URL(front.url).host, httpx.URL(front.url).port or 0), timeout=60) as sock:
        sock.sendall(b"POST /v1/models/double:predict HTTP/1.1\r\nHost: x\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n")
        sock.sendall(b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n")
        answer = b"".join(iter(lambda: sock.recv(1 << 16), b""))
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2]) == {"predictions": [[3, 4, 6, 8]]}


def test_a_large_body_arrives_whole_and_leaves_whole(front: Front) -> None:
    values = np.random.default_rng(1).standard_normal((1, 20_000)).astype(np.float32)
    tensor = {"name": "x", "shape": [20_000], "datatype": "FP32", "parameters": {"binary_data_size": values.nbytes}}
    head = json.dumps({"inputs": [tensor]}).encode()
    binary = front.http.post("/v2/models/alone/infer", content=head + values.tobytes(), headers={"Inference-Header-Content-Length": str(len(head))})
    plain = front.http.post("/v1/models/alone:predict", json={"instances": values.tolist()})
    assert binary.json()["outputs"][0]["data"] == plain.json()["predictions"] == [pytest.approx(float(values.sum()), rel=1e-4)]


def test_a_client_that_waits_to_be_asked_for_its_body_is_asked(front: Front) -> None:
    body = b'{"instances": [[1, 2, 3, 4]]}'
    with socket.create_connection((httpx.URL(front.url).host, httpx.URL(front.url).port or 0), timeout=60) as sock:
        head = b"POST /v1/models/double:predict HTTP/1.1\r\nHost: x\r\nConnection: close\r\nExpect: 100-continue\r\nContent-Length: %d\r\n\r\n"
        sock.sendall(head % len(body))
        assert sock.recv(1 << 10) == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(body)
        answer = b"".join(iter(lambda: sock.recv(1 << 16), b""))
    assert b"[[2.0,4.0,6.0,8.0]]" in answer


def test_a_binary_cloud_event_is_answered_with_one(front: Front) -> None:
    headers = {"ce-specversion": "1.0", "ce-id": "1", "ce-source": "test", "ce-type": "test", "Content-Type": "application/json"}
    response = front.http.post("/v1/models/double:predict", content=b'{"instances": [[1, 2, 3, 4]]}', headers=headers)
    assert response.json() == {"predictions": [[2, 4, 6, 8]]}
    assert (response.headers["ce-type"], response.headers["ce-source"]) == ("io.kserve.inference.response", "io.kserve.inference.double")


EVENTS = {
    "torn": (b'{"specversion": "1.0"', {"Content-Type": "application/cloudevents+json"}),
    "without its fields": (b'{"specversion": "1.0"}', {"Content-Type": "application/cloudevents+json"}),
    "without data": (b'{"specversion": "1.0", "id": "1", "source": "t", "type": "t"}', {"Content-Type": "application/cloudevents+json"}),
    "a list": (b"[]", {"Content-Type": "application/cloudevents+json"}),
    "binary with half its headers": (b"{}", {"ce-specversion": "1.0"}),
    "of a version that there is not": (b"{}", {"ce-specversion": "9", "ce-id": "1", "ce-source": "t", "ce-type": "t"}),
    "binary and torn": (b"{", {"ce-specversion": "1.0", "ce-id": "1", "ce-source": "t", "ce-type": "t"}),
}


@pytest.mark.parametrize(("body", "headers"), EVENTS.values(), ids=EVENTS)
def test_a_cloud_event_that_is_none_is_refused(front: Front, body: bytes, headers: dict[str, str]) -> None:
    assert front.http.post("/v1/models/double:predict", content=body, headers=headers).status_code == 400


def test_grpc_keeps_the_parameters_of_a_request(stub: Any) -> None:
    request = raw([[1, 2, 3, 4]])
    request.parameters["mine"].string_param = "kept"
    assert stub.ModelInfer(request).parameters["mine"].string_param == "kept"


def test_grpc_serves_the_one_version(stub: Any) -> None:
    request = raw([[1, 2, 3, 4]])
    request.model_version = "1"
    assert stub.ModelInfer(request).model_name == "double"
    request.model_version = "2"
    with pytest.raises(grpc.RpcError) as caught:
        stub.ModelInfer(request)
    assert caught.value.code().name == "NOT_FOUND"


def test_grpc_takes_typed_contents_of_a_wider_field_within_limits(stub: Any) -> None:
    request = pb.ModelInferRequest(model_name="same")
    contents = request.inputs.add(name="x", datatype="UINT8", shape=[1, 2]).contents.uint_contents
    contents.extend([0, 255])
    assert list(stub.ModelInfer(request).raw_output_contents) == [b"\0\xff"]
    contents[1] = 256
    with pytest.raises(grpc.RpcError, match="does not fit UINT8, got 256"):
        stub.ModelInfer(request)


def test_grpc_says_what_a_message_lacks(front: Front) -> None:
    port = front.log.split("serving gRPC on 127.0.0.1:")[1].split()[0]
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        for message in (b"\x3a\x05abc", b"\x0b", b"\x2a\x02\xff\xff", b"\xff" * 20):
            with pytest.raises(grpc.RpcError) as caught:
                call(message)
            assert caught.value.code().name == "INVALID_ARGUMENT", message
        with pytest.raises(grpc.RpcError) as caught:
            call(b"")
        assert caught.value.code().name == "NOT_FOUND"


def test_a_cancelled_grpc_request_is_cancelled_at_the_agent(stub: Any, agent: FakeAgent) -> None:
    agent.hold()
    before = len(agent.submits)
    call = stub.ModelInfer.future(raw([[1, 2, 3, 4]]))
    agent.wait(lambda: len(agent.submits) > before)
    call.cancel()
    agent.wait(lambda: agent.submits[-1].id in agent.cancels)
    agent.release()
