"""The protocols beside JSON over HTTP: gRPC through KServe's own client stubs, and the binary bodies that KServe's client sends."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from kserve import InferInput, InferRequest, InferResponse
from kserve.protocol.grpc import grpc_predict_v2_pb2 as pb
from kserve.protocol.grpc.grpc_predict_v2_pb2_grpc import GRPCInferenceServiceStub

from contracts.errors import Refused
from tests.predictor.fake_agent import PAIR, FakeAgent, info
from tests.predictor.front_process import Front


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeAgent]:
    path: Path = tmp_path_factory.mktemp("run") / "agent.sock"
    agent = FakeAgent(path, info("double"), info("pair", PAIR), info("loading", state="loading"))
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


def test_the_grpc_deadline_reaches_the_agent(stub: Any, agent: FakeAgent) -> None:
    agent.hold()
    with pytest.raises(grpc.RpcError) as caught:
        stub.ModelInfer(raw([[1, 2, 3, 4]]), timeout=0.2)
    assert caught.value.code().name == "DEADLINE_EXCEEDED"
    submit = agent.submits[-1]
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
