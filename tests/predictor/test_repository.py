"""Index, load, unload, metadata, configuration, readiness and versions, over HTTP, through KServe's stubs, and with Triton's messages."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import yaml
from kserve.protocol.grpc import grpc_predict_v2_pb2 as kserve_pb
from kserve.protocol.grpc.grpc_predict_v2_pb2_grpc import GRPCInferenceServiceStub

from predictor.protocols import management_pb2 as pb
from predictor.protocols.management import SERVICE
from tests.predictor.fake_agent import ALONE, PAIR, FakeAgent, info
from tests.predictor.front_process import ROOT, Front

ROW = [1, 2, 3, 4]


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeAgent]:
    functions = (info("double"), info("pair", PAIR), info("alone", ALONE), info("loading", state="loading"), info("broken", state="failed"))
    agent = FakeAgent(Path(tmp_path_factory.mktemp("run")) / "agent.sock", *functions)
    agent.start()
    yield agent
    agent.release()
    agent.kill()


@pytest.fixture(scope="module")
def shared_front(agent: FakeAgent) -> Iterator[Front]:
    front = Front(agent.path, "--grpc-port", "0").ready("double", "pair", "alone")
    yield front
    assert front.stop() == 0, front.log


@pytest.fixture
def front(shared_front: Front, agent: FakeAgent) -> Iterator[Front]:
    yield shared_front
    agent.release()
    assert load(shared_front, "double").status_code == 200
    shared_front.until(lambda: shared_front.metric("sluice_segment_used_bytes") == 0)


@pytest.fixture(scope="module")
def channel(shared_front: Front) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(shared_front.grpc_address) as channel:
        yield channel


def load(front: Front, name: str, **options: Any) -> httpx.Response:
    return front.http.post(f"/v2/repository/models/{name}/load", **options)


def unload(front: Front, name: str, **options: Any) -> httpx.Response:
    return front.http.post(f"/v2/repository/models/{name}/unload", **options)


def states(front: Front, **body: Any) -> dict[str, tuple[str, str]]:
    index = front.http.post("/v2/repository/index", json=body).json()
    assert {entry["version"] for entry in index} <= {"1"}
    return {entry["name"]: (entry["state"], entry["reason"]) for entry in index}


def triton(channel: grpc.Channel, method: str, request: Any, answered: Any) -> Any:
    return channel.unary_unary(f"/{SERVICE}/{method}", type(request).SerializeToString, answered.FromString)(request, timeout=60)


def refused(call: Callable[[], object]) -> tuple[str, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value.code().name, caught.value.details()


def test_the_index_tells_states_and_reasons(front: Front) -> None:
    assert states(front) == {
        "double": ("READY", ""),
        "pair": ("READY", ""),
        "alone": ("READY", ""),
        "loading": ("LOADING", "is loading"),
        "broken": ("UNAVAILABLE", "cannot be served: it is broken"),
    }
    assert states(front, ready=True).keys() == {"double", "pair", "alone"}
    assert front.http.post("/v2/repository/index").status_code == 200, "tritonclient sends no body"


def test_unload_and_load_take_a_model_out_and_back_again_and_again(front: Front) -> None:
    for _ in range(2):
        response = unload(front, "double", json={"parameters": {"unload_dependents": False}})
        assert (response.status_code, response.json()) == (200, {"name": "double", "unload": True})
        assert states(front)["double"] == ("UNAVAILABLE", "unloaded")
    response = front.predict("double", ROW)
    assert (response.status_code, response.headers["retry-after"]) == (503, "1")
    assert "is unloaded" in response.text
    assert front.http.get("/v2/models/double/ready").status_code == 503
    assert front.http.get("/v2/models/double").status_code == 200, "what it takes is still known"
    assert front.http.get("/v2/health/ready").status_code == 200
    assert front.predict("alone", [1]).status_code == 200
    for _ in range(2):
        response = load(front, "double", content=b"{}")
        assert (response.status_code, response.json()) == (200, {"name": "double", "load": True})
    assert front.predict("double", ROW).json() == {"predictions": [[2, 4, 6, 8]]}


def test_what_was_accepted_before_an_unload_is_answered(front: Front, agent: FakeAgent) -> None:
    agent.hold()
    answers: list[httpx.Response] = []
    asked = [
        threading.Thread(target=lambda: answers.append(httpx.post(f"{front.url}/v1/models/double:predict", json={"instances": [ROW]}))) for _ in "123"
    ]
    for thread in asked:
        thread.start()
    front.until(lambda: front.metric("sluice_in_flight_requests", function="default/double") == 3)
    assert unload(front, "double").status_code == 200
    assert front.predict("double", ROW).status_code == 503
    agent.release()
    for thread in asked:
        thread.join()
    assert [answer.json() for answer in answers] == [{"predictions": [[2, 4, 6, 8]]}] * 3


def test_load_waits_until_the_model_is_ready(front: Front, agent: FakeAgent) -> None:
    answers: list[httpx.Response] = []
    agent.tell(info("late", state="loading"))
    front.until(lambda: "late" in states(front))
    thread = threading.Thread(target=lambda: answers.append(httpx.post(f"{front.url}/v2/repository/models/late/load", timeout=60)))
    thread.start()
    assert load(front, "late", headers={"Sluice-Timeout-Ms": "10"}).status_code == 503, "is loading: the caller waits no longer"
    assert front.predict("double", ROW).status_code == 200, "nobody else waits"
    agent.tell(info("late"))
    thread.join()
    assert answers[0].status_code == 200
    assert front.predict("late", ROW).status_code == 200
    agent.remove("default/late")
    front.until(lambda: "late" not in states(front))


@pytest.mark.parametrize(("end", "code"), [("fail", 503), ("go", 404)])
def test_load_tells_why_it_cannot(front: Front, agent: FakeAgent, end: str, code: int) -> None:
    answers: list[httpx.Response] = []
    agent.tell(info("doomed", state="loading"))
    front.until(lambda: "doomed" in states(front))
    thread = threading.Thread(target=lambda: answers.append(httpx.post(f"{front.url}/v2/repository/models/doomed/load", timeout=60)))
    thread.start()
    if end == "fail":
        agent.tell(info("doomed", state="failed"))
    else:
        agent.remove("default/doomed")
    thread.join()
    assert answers[0].status_code == code, answers[0].text
    if end == "fail":
        assert "it is broken" in answers[0].text
        agent.remove("default/doomed")
    front.until(lambda: "doomed" not in states(front))


WRONG = {
    "a model that there is not": ("models/nothing/load", b"", 404, "nothing"),
    "an unload of one": ("models/nothing/unload", b"", 404, "nothing"),
    "another configuration": ("models/double/load", b'{"parameters": {"config": "{}"}}', 400, "config"),
    "files": ("models/double/load", b'{"parameters": {"file:1/model.pt": "AAAA"}}', 400, "file:1/model.pt"),
    "parameters of another kind": ("models/double/load", b'{"parameters": 7}', 400, "parameters"),
    "no object": ("models/double/unload", b"[]", 400, "object"),
    "no JSON": ("index", b"{", 400, "JSON"),
    "a filter that is none": ("index", b'{"ready": "yes"}', 400, "ready"),
    "a load that failed": ("models/broken/load", b"", 503, "it is broken"),
}


@pytest.mark.parametrize(("path", "body", "code", "message"), WRONG.values(), ids=WRONG)
def test_wrong_requests(front: Front, path: str, body: bytes, code: int, message: str) -> None:
    response = front.http.post(f"/v2/repository/{path}", content=body)
    assert response.status_code == code, response.text
    assert message in response.json()["error"]


def test_metadata_and_configuration(front: Front) -> None:
    assert front.http.get("/v2/models/pair").json() == {
        "name": "pair",
        "versions": ["1"],
        "platform": "sluice-catalog",
        "inputs": [{"name": "a", "datatype": "FP32", "shape": [-1, -1]}, {"name": "b", "datatype": "INT64", "shape": [-1, -1]}],
        "outputs": [{"name": "sum", "datatype": "FP32", "shape": [-1, -1]}, {"name": "count", "datatype": "INT64", "shape": [-1]}],
    }
    config = front.http.get("/v2/models/pair/config").json()
    assert (config["max_batch_size"], config["input"][1]) == (8, {"name": "b", "data_type": "TYPE_INT64", "dims": [-1]})
    assert config["dynamic_batching"] == {"preferred_batch_size": [8]}
    alone = front.http.get("/v2/models/alone/config").json()
    assert (alone["max_batch_size"], alone["input"][0]["dims"], "dynamic_batching" in alone) == (0, [-1], False)
    server = front.http.get("/v2").json()
    assert server["name"] == "sluice"
    assert {"model_repository", "statistics", "model_configuration", "binary_tensor_data"} <= set(server["extensions"])


@pytest.mark.parametrize("path", ["", "/ready", "/config", "/stats"])
def test_a_model_has_version_1(front: Front, path: str) -> None:
    assert front.http.get(f"/v2/models/double/versions/1{path}").json().keys() == front.http.get(f"/v2/models/double{path}").json().keys()
    response = front.http.get(f"/v2/models/double/versions/2{path}")
    assert response.status_code == 404
    assert "'2'" in response.json()["error"]


@pytest.mark.parametrize("path", ["/v2/logging", "/v2/trace/setting", "/v2/systemsharedmemory/status", "/v2/cudasharedmemory/region/a/register"])
def test_what_is_not_offered_says_so(front: Front, path: str) -> None:
    response = front.http.get(path)
    assert (response.status_code, "error" in response.json()) == (501, True)


def test_kserves_grpc_messages(front: Front, channel: grpc.Channel) -> None:
    stub = GRPCInferenceServiceStub(channel)
    response = stub.RepositoryModelUnload(kserve_pb.RepositoryModelUnloadRequest(model_name="double"))
    assert (response.model_name, response.isUnloaded) == ("double", True)
    assert not stub.ModelReady(kserve_pb.ModelReadyRequest(name="double")).ready
    request = kserve_pb.ModelInferRequest(model_name="double", raw_input_contents=[b"\0" * 16])
    request.inputs.add(name="x", datatype="FP32", shape=[1, 4])
    code, message = refused(lambda: stub.ModelInfer(request))
    assert code == "UNAVAILABLE"
    assert "is unloaded" in message
    response = stub.RepositoryModelLoad(kserve_pb.RepositoryModelLoadRequest(model_name="double"))
    assert (response.model_name, response.isLoaded) == ("double", True)
    assert stub.ServerMetadata(kserve_pb.ServerMetadataRequest()).name == "sluice"
    assert refused(lambda: stub.RepositoryModelLoad(kserve_pb.RepositoryModelLoadRequest(model_name="nothing")))[0] == "NOT_FOUND"


def test_tritons_grpc_messages(front: Front, channel: grpc.Channel) -> None:
    name = pb.RepositoryModelRequest(model_name="double")
    name.parameters["unload_dependents"].bool_param = False
    triton(channel, "RepositoryModelUnload", name, pb.RepositoryModelResponse)
    index = triton(channel, "RepositoryIndex", pb.RepositoryIndexRequest(), pb.RepositoryIndexResponse)
    assert {one.name: (one.state, one.reason) for one in index.models} == states(front)
    ready = triton(channel, "RepositoryIndex", pb.RepositoryIndexRequest(ready=True), pb.RepositoryIndexResponse)
    assert [one.name for one in ready.models] == ["pair", "alone"]
    triton(channel, "RepositoryModelLoad", pb.RepositoryModelRequest(model_name="double"), pb.RepositoryModelResponse)
    config = triton(channel, "ModelConfig", pb.ModelRequest(name="pair"), pb.ModelConfigResponse).config
    assert [(one.name, one.data_type, list(one.dims)) for one in config.input] == [("a", pb.TYPE_FP32, [-1]), ("b", pb.TYPE_INT64, [-1])]


RPCS: dict[str, tuple[str, Any, str]] = {
    "a repository": ("RepositoryModelLoad", pb.RepositoryModelRequest(repository_name="/models", model_name="double"), "INVALID_ARGUMENT"),
    "an index of one": ("RepositoryIndex", pb.RepositoryIndexRequest(repository_name="/models"), "INVALID_ARGUMENT"),
    "another version": ("ModelMetadata", pb.ModelRequest(name="double", version="2"), "NOT_FOUND"),
    "another version's readiness": ("ModelReady", pb.ModelRequest(name="double", version="2"), "NOT_FOUND"),
    "a model that there is not": ("ModelStatistics", pb.ModelRequest(name="nothing"), "NOT_FOUND"),
    "metadata of a model that is loading": ("ModelMetadata", pb.ModelRequest(name="loading"), "UNAVAILABLE"),
    "traces": ("TraceSetting", pb.Empty(), "UNIMPLEMENTED"),
    "shared memory": ("SystemSharedMemoryStatus", pb.Empty(), "UNIMPLEMENTED"),
}


@pytest.mark.parametrize(("method", "request_", "code"), RPCS.values(), ids=RPCS)
def test_grpc_codes(front: Front, channel: grpc.Channel, method: str, request_: Any, code: str) -> None:
    assert refused(lambda: triton(channel, method, request_, pb.Empty))[0] == code


def test_grpc_load_refuses_parameters(front: Front, channel: grpc.Channel) -> None:
    request = pb.RepositoryModelRequest(model_name="double")
    request.parameters["config"].string_param = "{}"
    assert refused(lambda: triton(channel, "RepositoryModelLoad", request, pb.Empty))[0] == "INVALID_ARGUMENT"


def test_the_description_is_served_and_each_of_its_paths_is_there(front: Front) -> None:
    served = front.http.get("/openapi.json").json()
    written = yaml.safe_load((ROOT / "predictor/protocols/openapi.yaml").read_text())
    assert served["paths"].keys() == written["paths"].keys()
    for path, methods in served["paths"].items():
        for method in methods.keys() & {"get", "post"}:
            response = front.http.request(method, path.format(name="double", version="1"), json={})
            assert response.status_code not in (404, 405, 501), (method, path)
            assert str(response.status_code) in methods[method]["responses"], (method, path, response.status_code)


def test_a_path_that_there_is_not_is_an_error_in_json(front: Front) -> None:
    assert front.http.get("/v3").json() == {"error": "Not Found"}
    response = front.http.delete("/v2/models/double")
    assert (response.status_code, response.json()) == (405, {"error": "Method Not Allowed"})
    assert set(response.headers["allow"].split(", ")) == {"GET", "HEAD"}
