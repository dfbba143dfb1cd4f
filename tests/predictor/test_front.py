"""The front end to end, without faults: protocols, codes, batching, limits, over real HTTP, a real socket and real shared memory."""

import asyncio
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contracts.errors import NotPermitted, Refused, Unavailable
from tests.predictor.fake_agent import ALONE, PAIR, FakeAgent, info
from tests.predictor.front_process import Front


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeAgent]:
    path: Path = tmp_path_factory.mktemp("run") / "agent.sock"
    functions = (
        info("double"),
        info("pair", PAIR),
        info("alone", ALONE),
        info("loading", state="loading"),
        info("broken", state="failed"),
        info("hasty", timeout_ms=100),
        info("small", max_batch=1, slo_ms=5000),
        info("double", namespace="other"),
    )
    agent = FakeAgent(path, *functions)
    agent.start()
    yield agent
    agent.release()
    agent.kill()


@pytest.fixture(scope="module")
def shared_front(agent: FakeAgent) -> Iterator[Front]:
    front = Front(agent.path, "--max-body-bytes", "2Mi").ready("double")
    yield front
    assert front.stop() == 0, front.log


@pytest.fixture
def front(shared_front: Front, agent: FakeAgent) -> Iterator[Front]:
    """The shared front; afterwards nothing may be left in its shared memory."""
    yield shared_front
    agent.release()
    agent.refuse = None
    shared_front.until(lambda: shared_front.metric("sluice_segment_used_bytes") == 0)


def tensor(name: str, data: Any, datatype: str = "FP32") -> dict[str, Any]:
    return {"name": name, "shape": [len(data), len(data[0])], "datatype": datatype, "data": data}


def test_v1_answers_rows_with_rows_and_tells_the_timing(front: Front) -> None:
    response = front.predict("double", [1, 2, 3, 4], [5, 6, 7, 8.5])
    assert response.json() == {"predictions": [[2, 4, 6, 8], [10, 12, 14, 17]]}
    assert response.headers["server-timing"].endswith("swap;dur=2.000, run;dur=3.000")


def test_v1_with_several_inputs_and_outputs(front: Front) -> None:
    response = front.predict("pair", {"a": [1, 2], "b": [3, 4]}, {"a": [0, 0], "b": [5, 6]})
    assert response.json() == {"predictions": [{"sum": [4, 6], "count": 2}, {"sum": [5, 6], "count": 2}]}


def test_a_model_without_batches(front: Front) -> None:
    assert front.predict("alone", [1, 2, 3.5]).json() == {"predictions": [6.5]}


def test_v2_keeps_the_id_gives_the_wanted_outputs_and_tells_timing_and_place(front: Front) -> None:
    body = {"id": "seven", "inputs": [tensor("b", [[3, 4]], "INT64"), tensor("a", [[1, 2]])], "outputs": [{"name": "sum"}]}
    answer = front.http.post("/v2/models/pair/infer", json=body).json()
    parameters = answer.pop("parameters")
    assert answer == {"id": "seven", "model_name": "pair", "outputs": [{"name": "sum", "shape": [1, 2], "datatype": "FP32", "data": [4, 6]}]}
    assert (parameters["sluice_swap_ms"], parameters["sluice_run_ms"], parameters["sluice_cold"]) == (2, 3, False)
    assert parameters["sluice_queue_ms"] >= 1
    assert (parameters["sluice_batch_row"], parameters["sluice_batch_rows"]) == (0, 1)


def test_a_plain_body_without_content_type_is_json(front: Front) -> None:
    body = json.dumps({"inputs": [tensor("x", [[1, 2, 3, 4]])]}).encode()
    assert front.http.post("/v2/models/double/infer", content=body).json()["outputs"][0]["data"] == [2, 4, 6, 8]


def test_metadata_names_what_the_model_takes(front: Front) -> None:
    metadata = front.http.get("/v2/models/pair").json()
    assert metadata["inputs"] == [{"name": "a", "datatype": "FP32", "shape": [-1, -1]}, {"name": "b", "datatype": "INT64", "shape": [-1, -1]}]
    assert metadata["outputs"][1] == {"name": "count", "datatype": "INT64", "shape": [-1]}


def test_the_same_name_in_another_namespace_keeps_apart(front: Front) -> None:
    assert {"double", "other.double"} <= set(front.http.get("/v1/models").json()["models"])
    assert front.predict("other.double", [1, 2, 3, 4]).json() == {"predictions": [[2, 4, 6, 8]]}


ROW = b'{"instances": [[1, 2, 3, 4]]}'
CODES = {
    "a torn body": ("/v1/models/double:predict", ROW[:-2], {}, 400, "no JSON"),
    "no instances": ("/v1/models/double:predict", b"{}", {}, 400, "instances"),
    "a wrong shape": ("/v1/models/double:predict", b'{"instances": [[1, 2]]}', {}, 400, "x: shape must fit ['batch', 4], got [1, 2]"),
    "a missing input": (
        "/v2/models/pair/infer",
        b'{"inputs": [{"name": "a", "shape": [1, 1], "datatype": "FP32", "data": [1]}]}',
        {},
        400,
        "missing",
    ),
    "V2 that is none": ("/v2/models/double/infer", b'{"inputs": [{"name": "x"}]}', {}, 400, "x.shape"),
    "more rows than a batch holds": ("/v1/models/small:predict", b'{"instances": [[1, 2, 3, 4], [1, 2, 3, 4]]}', {}, 400, "at most 1 rows"),
    "a timeout that is none": ("/v1/models/double:predict", ROW, {"Sluice-Timeout-Ms": "soon"}, 400, "Sluice-Timeout-Ms"),
    "a negative timeout": ("/v1/models/double:predict", ROW, {"Sluice-Timeout-Ms": "-1"}, 400, "Sluice-Timeout-Ms"),
    "too large a body": ("/v1/models/double:predict", b" " * (2 << 20) + ROW, {}, 413, "2097152"),
    "no such model": ("/v1/models/nothing:predict", ROW, {}, 404, "nothing"),
    "no such model in V2": ("/v2/models/..%2f..%2fetc/infer", ROW, {}, 404, ""),
    "a model that is loading": ("/v1/models/loading:predict", ROW, {}, 503, "is loading"),
    "a model that failed to load": ("/v1/models/broken:predict", ROW, {}, 503, "it is broken"),
    "a model that fails": ("/v1/models/double:predict", b'{"instances": [[13, 2, 3, 4]]}', {}, 500, "bad luck"),
    "a version that there is not": ("/v2/models/double/versions/2/infer", b'{"inputs": []}', {}, 404, "version '2'"),
    "the one version": ("/v2/models/double/versions/1/infer", b'{"inputs": []}', {}, 400, "missing"),
}


@pytest.mark.parametrize(("path", "body", "headers", "code", "message"), CODES.values(), ids=CODES)
def test_codes_and_reasons(front: Front, path: str, body: bytes, headers: dict[str, str], code: int, message: str) -> None:
    response = front.http.post(path, content=body, headers={"Content-Type": "application/json", **headers})
    assert response.status_code == code, response.text
    assert message in response.text
    assert (int(response.headers["retry-after"]) >= 1) if code in (429, 503) else "retry-after" not in response.headers


REFUSALS = {
    "refused": (Refused("later", retry_after_ms=2500), 429, "3"),
    "lost": (Unavailable("the lane was lost"), 503, "1"),
    "foreign": (NotPermitted("not yours"), 403, None),
}


@pytest.mark.parametrize(("error", "code", "retry_after"), REFUSALS.values(), ids=REFUSALS)
def test_the_agents_errors_reach_the_client(front: Front, agent: FakeAgent, error: Any, code: int, retry_after: str | None) -> None:
    agent.refuse = error
    response = front.predict("double", [1, 2, 3, 4])
    assert (response.status_code, response.headers.get("retry-after")) == (code, retry_after)
    assert error.message in response.text


def test_readiness_is_per_model(front: Front) -> None:
    codes = {name: front.http.get(f"/v2/models/{name}/ready") for name in ("double", "loading", "broken", "nothing")}
    assert {name: response.status_code for name, response in codes.items()} == {"double": 200, "loading": 503, "broken": 503, "nothing": 404}
    assert codes["loading"].headers["retry-after"] == "1"
    assert front.http.get("/v1/models/loading").status_code == 503
    assert front.http.get("/v2/health/ready").status_code == 200


@pytest.mark.parametrize(
    ("name", "headers"), [("hasty", {}), ("double", {"Sluice-Timeout-Ms": "100"})], ids=["the function's timeout", "the request's"]
)
def test_past_its_deadline_a_request_is_told_and_cancelled(front: Front, agent: FakeAgent, name: str, headers: dict[str, str]) -> None:
    agent.hold()
    before = len(agent.submits)

    def told() -> bool:
        """A busy machine may let the deadline pass before the agent is asked at all."""
        assert front.predict(name, [1, 2, 3, 4], **headers).status_code == 504
        return len(agent.submits) > before

    front.until(told)
    batch = agent.submits[before].id
    agent.wait(lambda: batch in agent.cancels)


def test_a_client_that_hangs_up_cancels_its_request(front: Front, agent: FakeAgent) -> None:
    agent.hold()
    before = len(agent.submits)
    body = b'{"instances": [[1, 2, 3, 4]]}'
    with socket.create_connection((httpx.URL(front.url).host, httpx.URL(front.url).port or 0), timeout=120) as sock:
        sock.sendall(b"POST /v1/models/double:predict HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        agent.wait(lambda: len(agent.submits) > before)
    agent.wait(lambda: agent.submits[-1].id in agent.cancels)


async def _many(front: Front, bodies: list[Any], path: str = "/v2/models/double/infer") -> list[httpx.Response]:
    limits = httpx.Limits(max_connections=200)
    async with httpx.AsyncClient(base_url=front.url, limits=limits, timeout=120) as client:
        return list(await asyncio.gather(*(client.post(path, json=body) for body in bodies)))


def _bodies(count: int) -> list[Any]:
    return [{"id": str(number), "inputs": [tensor("x", [[number + 100, 2, 3, 4]])]} for number in range(count)]


@pytest.mark.asyncio
async def test_requests_that_wait_are_joined_and_each_gets_its_own_rows(front: Front, agent: FakeAgent) -> None:
    before = len(agent.submits)
    agent.hold()
    asked = asyncio.create_task(_many(front, _bodies(60)))
    await asyncio.to_thread(agent.wait, lambda: sum(len(one.parts) for one in agent.submits[before:]) >= 57)
    agent.release()
    answers = [response.json() for response in await asked]
    assert sorted(int(answer["id"]) for answer in answers) == list(range(60))
    places: dict[int, set[int]] = {}
    for answer in answers:
        assert answer["outputs"][0]["data"] == [2 * (int(answer["id"]) + 100), 4, 6, 8]
        parameters = answer["parameters"]
        assert parameters["sluice_batch_rows"] <= 8
        places.setdefault(parameters["sluice_batch"], set()).add(parameters["sluice_batch_row"])
    sizes = {one.id: sum(part.rows for part in one.parts) for one in agent.submits[before:]}
    assert {batch: set(range(size)) for batch, size in sizes.items()} == places
    assert max(sizes.values()) == 8


@pytest.mark.asyncio
@pytest.mark.parametrize(("bad", "code"), [(13, 500), (14, 400)], ids=["the model fails", "the model refuses its values"])
async def test_a_bad_request_fails_alone(front: Front, agent: FakeAgent, bad: int, code: int) -> None:
    agent.hold()
    bodies = _bodies(5)
    bodies[3]["inputs"][0]["data"][0][0] = bad
    before = len(agent.submits)
    asked = asyncio.create_task(_many(front, bodies))
    await asyncio.to_thread(agent.wait, lambda: len(agent.submits) > before)
    agent.release()
    assert [response.status_code for response in await asked] == [200, 200, 200, code, 200]


@pytest.mark.asyncio
async def test_a_full_queue_refuses_with_a_time_to_come_back(front: Front, agent: FakeAgent) -> None:
    agent.hold()
    asked = asyncio.create_task(_many(front, _bodies(80), "/v2/models/small/infer"))
    await asyncio.to_thread(front.until, lambda: front.metric("sluice_refusals_total", function="default/small") >= 16)
    agent.release()
    answers = await asked
    refused = [response for response in answers if response.status_code == 429]
    assert len(refused) == 16
    assert all(int(response.headers["retry-after"]) >= 1 for response in refused)
    assert sum(response.status_code == 200 for response in answers) == 64


@pytest.mark.asyncio
async def test_full_shared_memory_refuses_and_comes_back(front: Front, agent: FakeAgent) -> None:
    agent.hold()
    row = [1.0] * 20_000
    bodies = [{"inputs": [{"name": "x", "shape": [20_000], "datatype": "FP32", "data": row}]} for _ in range(20)]
    asked = asyncio.create_task(_many(front, bodies, "/v2/models/alone/infer"))
    await asyncio.to_thread(front.until, lambda: front.metric("sluice_refusals_total", function="default/alone") >= 7)
    agent.release()
    answers = await asked
    assert {response.status_code for response in answers} == {200, 429}
    assert all("shared memory" in response.text for response in answers if response.status_code == 429)


def test_metrics_tell_queue_swap_run_total_and_batches(front: Front) -> None:
    label = {"function": "default/pair"}
    names = (
        "sluice_request_seconds_count",
        "sluice_queue_seconds_count",
        "sluice_swap_seconds_count",
        "sluice_run_seconds_count",
        "sluice_batch_rows_count",
    )
    before = [front.metric(name, **label) for name in names]
    assert front.predict("pair", {"a": [1], "b": [2]}).status_code == 200
    assert [front.metric(name, **label) for name in names] == [count + 1 for count in before]
    assert front.metric("sluice_requests_total", function="default/pair", outcome="ok") >= 1
    assert front.metric("sluice_in_flight_requests", **label) == 0


PATHS = st.sampled_from(["/v1/models/double:predict", "/v2/models/double/infer", "/v2/models/pair/infer", "/v1/models/pair:predict"])
JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5), lambda inner: st.lists(inner, max_size=4), max_leaves=8
)
DOCUMENTS = st.fixed_dictionaries(
    {},
    optional={
        "instances": JSON,
        "inputs": st.lists(
            st.fixed_dictionaries({}, optional={"name": st.sampled_from(["x", "a"]), "shape": JSON, "datatype": st.just("FP32"), "data": JSON}),
            max_size=3,
        ),
        "id": JSON,
        "outputs": JSON,
    },
)


@settings(max_examples=60)
@given(path=PATHS, body=st.binary(max_size=40) | DOCUMENTS.map(lambda value: json.dumps(value).encode()))
def test_no_body_brings_the_front_down(front: Front, path: str, body: bytes) -> None:
    response = front.http.post(path, content=body, headers={"Content-Type": "application/json"})
    assert response.status_code in (200, 400), response.text
