"""Text over every protocol: the front tokenises, joins what is about as long, and says what is wrong with a text."""

import asyncio
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import msgspec
import numpy as np
import pytest
from blake3 import blake3
from kserve.protocol.grpc import grpc_predict_v2_pb2 as pb
from kserve.protocol.grpc.grpc_predict_v2_pb2_grpc import GRPCInferenceServiceStub

from contracts.artifact import Signature, Text
from tests.models.text_models import WORDS, tokenizer_json
from tests.predictor.fake_agent import TOKENS, FakeAgent, info
from tests.predictor.front_process import Front

CONTENT = tokenizer_json().encode()
NAME = f"{blake3(CONTENT).hexdigest()}.tokenizer"
BOAT = [WORDS.index(word) for word in ("the", "old", "boat")]


def text_model(tokenizer: str = NAME) -> Signature:
    return msgspec.structs.replace(TOKENS, text=Text(tokenizer, 8))


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeAgent]:
    path: Path = tmp_path_factory.mktemp("run") / "agent.sock"
    lost = text_model("0" * 64 + ".tokenizer")
    agent = FakeAgent(path, info("text", text_model(), slo_ms=60_000, timeout_ms=120_000), info("tokens", TOKENS), info("double"), info("lost", lost))
    agent.tokenizers[NAME] = CONTENT
    agent.start()
    yield agent
    agent.kill()


@pytest.fixture(scope="module")
def front(agent: FakeAgent) -> Iterator[Front]:
    front = Front(agent.path, "--grpc-port", "0").ready("text", "tokens", "double", "lost")
    yield front
    front.until(lambda: front.metric("sluice_segment_used_bytes") == 0)
    assert front.stop() == 0, front.log


@pytest.fixture(scope="module")
def stub(front: Front) -> Iterator[Any]:
    port = front.log.split("serving gRPC on 127.0.0.1:")[1].split()[0]
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield GRPCInferenceServiceStub(channel)


def framed(*texts: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(text)) + text for text in texts)


def binary(front: Front, data: bytes, shape: list[int], model: str = "text") -> httpx.Response:
    tensor = {"name": "text", "shape": shape, "datatype": "BYTES", "parameters": {"binary_data_size": len(data)}}
    head = json.dumps({"inputs": [tensor]}).encode()
    headers = {"Inference-Header-Content-Length": str(len(head)), "Content-Type": "application/octet-stream"}
    return front.http.post(f"/v2/models/{model}/infer", content=head + data, headers=headers)


def document(*data: Any, shape: list[int] | None = None, name: str = "text", datatype: str = "BYTES") -> dict[str, Any]:
    return {"inputs": [{"name": name, "shape": shape or [len(data)], "datatype": datatype, "data": list(data)}]}


def outputs(response: httpx.Response) -> dict[str, list[int]]:
    assert response.status_code == 200, response.text
    return {output["name"]: output["data"] for output in response.json()["outputs"]}


def test_v1_takes_a_row_of_text_or_an_object_that_holds_it(front: Front) -> None:
    plain = front.predict("text", "the old boat", "a").json()
    assert plain["predictions"] == [{"count": 3, "ids": BOAT}, {"count": 1, "ids": [2, 1, 1]}]
    assert front.predict("text", {"text": "the old boat"}, {"text": "a"}).json() == plain


@pytest.mark.parametrize("nested", [False, True], ids=["[rows]", "[rows, 1]"])
def test_v2_takes_text_as_json(front: Front, nested: bool) -> None:
    data = [["the old boat"], ["a"]] if nested else ["the old boat", "a"]
    for shape in ([2], [2, 1]):
        found = outputs(front.http.post("/v2/models/text/infer", json=document(*data, shape=shape)))
        assert found == {"count": [3, 1], "ids": [*BOAT, 2, 1, 1]}


def test_v2_takes_text_as_binary_data(front: Front) -> None:
    assert outputs(binary(front, framed(b"the old boat", b"a"), [2, 1]))["count"] == [3, 1]


def test_grpc_takes_text_raw_and_typed(stub: Any) -> None:
    for raw in (True, False):
        request = pb.ModelInferRequest(model_name="text", raw_input_contents=[framed(b"the old boat", b"a")] if raw else [])
        tensor = request.inputs.add(name="text", datatype="BYTES", shape=[2])
        if not raw:
            tensor.contents.bytes_contents.extend([b"the old boat", b"a"])
        response = stub.ModelInfer(request)
        assert np.frombuffer(response.raw_output_contents[0], np.int64).tolist() == [3, 1]


def test_tokens_are_still_taken_as_tokens(front: Front) -> None:
    request = document([7, 8], shape=[1, 2], name="input_ids", datatype="INT64")
    request["inputs"] += document([1, 0], shape=[1, 2], name="attention_mask", datatype="INT64")["inputs"]
    for model in ("text", "tokens"):
        assert outputs(front.http.post(f"/v2/models/{model}/infer", json=request)) == {"count": [1], "ids": [7, 8]}
    assert front.predict("text", {"input_ids": [7, 8], "attention_mask": [1, 0]}).json()["predictions"] == [{"count": 1, "ids": [7, 8]}]


def test_a_long_text_is_cut_to_what_the_model_takes(front: Front) -> None:
    for words in (20, 2000):  # the second goes through a thread
        assert outputs(front.http.post("/v2/models/text/infer", json=document("old " * words)))["count"] == [8]


def test_metadata_lists_the_text_and_the_configuration_says_that_it_is_optional(front: Front) -> None:
    inputs = front.http.get("/v2/models/text").json()["inputs"]
    assert {"name": "text", "datatype": "BYTES", "shape": [-1, 1]} in inputs
    assert [one["name"] for one in inputs] == ["input_ids", "attention_mask", "text"]
    config = front.http.get("/v2/models/text/config").json()["input"]
    assert {"name": "text", "data_type": "TYPE_STRING", "dims": [1], "optional": True} in config
    assert all(one["optional"] for one in config)
    assert [one["name"] for one in front.http.get("/v2/models/tokens").json()["inputs"]] == ["input_ids", "attention_mask"]
    assert all("optional" not in one for one in front.http.get("/v2/models/tokens/config").json()["input"])


WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "a model without a tokenizer": ("tokens", document("a"), "text: this model takes no text, it came without a tokenizer"),
    "a model of numbers": ("double", document("a", name="x"), "x: this model takes no text"),
    "text by another name": ("text", document("a", name="input_ids"), "input_ids: text must come as the input 'text'"),
    "text that is said to be numbers": ("text", document("a", datatype="INT64"), "text.datatype: must be BYTES"),
    "text and tokens": ("text", {"inputs": [*document("a")["inputs"], *document("a")["inputs"]]}, "must come alone"),
    "a number": ("text", document(5), "text[0]: must be text, got 5"),
    "null": ("text", document("a", None), "text[1]: must be text, got None"),
    "no rows": ("text", document(shape=[0]), "text: must have from 1 to 1024 rows, got 0"),
    "more rows than the model takes": ("text", document(*["a"] * 9), "at most 8 rows a request, got 9"),
    "more rows than any model takes": ("text", document("a", shape=[1 << 40]), "text: must have from 1 to 1024 rows"),
    "another number than the shape says": ("text", document("a", shape=[2]), "text.data: must be 2 texts, as its shape says"),
    "a shape of two texts a row": ("text", document("a", "b", shape=[1, 2]), "text.shape: must be [rows] or [rows, 1]"),
    "a shape that is none": ("text", document("a", shape=["1"]), "text.shape: must be [rows] or [rows, 1]"),
    "a text that is too long": ("text", document("a" * 65537), "text[0]: must have at most 65536 bytes, got '65537 bytes'"),
    "a text without a token": ("text", document("a", " "), "text: has no token in it"),
}


@pytest.mark.parametrize(("model", "body", "message"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_with_a_text_is_said(front: Front, model: str, body: dict[str, Any], message: str) -> None:
    response = front.http.post(f"/v2/models/{model}/infer", json=body)
    assert response.status_code == 400
    assert message in response.json()["error"]


TORN = {
    "no UTF-8": (framed(b"a\xff"), [1], "text[0]: must be UTF-8"),
    "shorter than its length": (framed(b"the boat")[:-1], [1], "text[0]: is shorter than the lengths in it say"),
    "a torn length": (b"\1\0", [1], "text[0]: is shorter than the lengths in it say"),
    "more than its rows": (framed(b"a", b"b"), [1], "text.data: its 1 texts take 5 bytes"),
    "fewer than its rows": (framed(b"a"), [2], "text[1]: is shorter"),
}


@pytest.mark.parametrize(("data", "shape", "message"), TORN.values(), ids=TORN)
def test_binary_text_that_is_torn_is_said(front: Front, data: bytes, shape: list[int], message: str) -> None:
    response = binary(front, data, shape)
    assert response.status_code == 400
    assert message in response.json()["error"]


def test_v1_says_what_a_model_without_a_tokenizer_takes(front: Front) -> None:
    response = front.predict("tokens", "the old boat")
    assert response.status_code == 400
    assert "a row must be an object with the inputs input_ids, attention_mask" in response.json()["error"]


def test_a_tokenizer_that_never_came_is_said(front: Front) -> None:
    response = front.predict("lost", "the old boat")
    assert response.status_code == 503
    assert "the tokenizer of this model has not come yet" in response.json()["error"]


@pytest.mark.asyncio
async def test_texts_of_different_lengths_run_as_one_batch(front: Front, agent: FakeAgent) -> None:
    agent.hold()
    before = len(agent.submits)
    async with httpx.AsyncClient(base_url=front.url, timeout=60) as http:

        async def ask(words: int) -> dict[str, list[int]]:
            return outputs(await http.post("/v2/models/text/infer", json=document(" ".join(["old"] * words))))

        asked = asyncio.gather(*map(ask, range(1, 8)))
        try:
            await asyncio.to_thread(front.until, lambda: front.metric("sluice_in_flight_requests", function="default/text") == 7, 60)
        finally:
            agent.release()
        for words, found in zip(range(1, 8), await asked, strict=True):
            assert found == {"count": [words], "ids": [WORDS.index("old")] * words}
    assert max(len(one.parts) for one in agent.submits[before:]) >= 6


def test_a_function_that_is_gone_and_comes_back_brings_its_tokenizer_along(front: Front, agent: FakeAgent) -> None:
    for _ in range(3):
        agent.remove("default/text")
        front.until(lambda: front.predict("text", "a").status_code == 404)
        agent.tell(info("text", text_model(), slo_ms=60_000, timeout_ms=120_000))
        front.until(lambda: front.http.get("/v2/models/text/ready").status_code == 200)
        assert front.predict("text", "the old boat").json()["predictions"] == [{"count": 3, "ids": BOAT}]
