"""KServe's own `InferenceRESTClient` and `InferenceGRPCClient`."""

from __future__ import annotations

from collections.abc import AsyncIterator

import grpc
import httpx
import numpy as np
import pytest
import pytest_asyncio
from kserve import InferenceGRPCClient, InferenceRESTClient, InferInput, InferRequest
from kserve.inference_client import RESTConfig
from kserve.protocol.infer_type import RequestedOutput

from tests.protocol.outside.expected import (
    DATATYPES,
    DATATYPES_MODEL,
    DOUBLE,
    IDENTITY,
    LEFT,
    POSITIVE,
    RIGHT,
    SENTENCES,
    SEVERAL,
    SUM,
    TEXT,
    extremes,
)

pytestmark = pytest.mark.asyncio


@pytest_asyncio.fixture
async def v1() -> AsyncIterator[InferenceRESTClient]:
    async with InferenceRESTClient(RESTConfig(protocol="v1")) as client:
        yield client


@pytest_asyncio.fixture
async def v2() -> AsyncIterator[InferenceRESTClient]:
    async with InferenceRESTClient(RESTConfig(protocol="v2")) as client:
        yield client


@pytest_asyncio.fixture
async def remote(rpc: str) -> AsyncIterator[InferenceGRPCClient]:
    async with InferenceGRPCClient(rpc) as client:
        yield client


@pytest.fixture
def url(http: str) -> str:
    return f"http://{http}"


def tensor(name: str, datatype: str, values: np.ndarray, binary: bool) -> InferInput:
    given = InferInput(name, list(values.shape), datatype)
    given.set_data_from_numpy(values, binary_data=binary)
    return given


def several(binary: bool) -> InferRequest:
    inputs = [tensor("left", "FP32", LEFT, binary), tensor("right", "INT64", RIGHT, binary)]
    return InferRequest(SEVERAL, inputs, request_id="seven", parameters={"tenant": "me"})


async def test_v1(v1: InferenceRESTClient, url: str) -> None:
    answer = await v1.infer(url, {"instances": [[1, 2.5], [3, 4]]}, model_name=IDENTITY)
    assert answer == {"predictions": [[1.0, 2.5], [3.0, 4.0]]}
    rows = [{"left": left.tolist(), "right": right.tolist()} for left, right in ((LEFT[0], RIGHT[0]), (-LEFT[0], RIGHT[0]))]
    answer = await v1.infer(url, {"instances": rows}, model_name=SEVERAL)
    assert [row["double"] for row in answer["predictions"]] == [DOUBLE[0].tolist()] * 2
    assert await v1.is_model_ready(url, IDENTITY)
    assert await v1.is_server_live(url)


async def test_v1_text(v1: InferenceRESTClient, url: str) -> None:
    answer = await v1.infer(url, {"instances": SENTENCES}, model_name=TEXT)
    assert len(answer["predictions"]) == len(SENTENCES)


@pytest.mark.parametrize("binary_in", [True, False], ids=["binary in", "JSON in"])
@pytest.mark.parametrize("binary_out", [True, False], ids=["binary out", "JSON out"])
async def test_v2(v2: InferenceRESTClient, url: str, binary_in: bool, binary_out: bool) -> None:
    request = several(binary_in)
    request.request_outputs = [RequestedOutput(name, parameters={"binary_data": binary_out}) for name in ("sum", "double")]
    answer = await v2.infer(url, request, model_name=SEVERAL)
    assert (answer.id, answer.model_name) == ("seven", SEVERAL)
    assert [output.name for output in answer.outputs] == ["sum", "double"]
    np.testing.assert_array_equal(answer.outputs[0].as_numpy(), SUM)
    np.testing.assert_array_equal(answer.outputs[1].as_numpy(), DOUBLE)


async def test_v2_asks_and_finds_the_server(v2: InferenceRESTClient, url: str) -> None:
    assert await v2.is_server_live(url)
    assert await v2.is_server_ready(url)
    assert await v2.is_model_ready(url, SEVERAL)
    assert not await v2.is_model_ready(url, "nobody")
    for name, inputs, status in ((SEVERAL, [tensor("left", "FP32", LEFT, False)], 400), ("nobody", [tensor("x", "FP32", LEFT, False)], 404)):
        with pytest.raises(httpx.HTTPStatusError) as refused:
            await v2.infer(url, InferRequest(name, inputs), model_name=name)
        assert refused.value.response.status_code == status


@pytest.mark.parametrize("raw", [True, False], ids=["raw", "typed"])
async def test_grpc(remote: InferenceGRPCClient, raw: bool) -> None:
    answer = await remote.infer(several(raw))
    assert answer.id == "seven"
    for output, expected in zip(answer.outputs, (SUM, DOUBLE, POSITIVE), strict=True):
        np.testing.assert_array_equal(output.as_numpy(), expected)


@pytest.mark.parametrize("raw", [True, False], ids=["raw", "typed"])
async def test_grpc_takes_every_datatype(remote: InferenceGRPCClient, raw: bool) -> None:
    known = [name for name in DATATYPES if name != "BF16" and (raw or name != "FP16")]  # the client has no BF16; FP16 is raw alone
    inputs = [tensor(f"x_{name.lower()}", name, extremes(name), raw) for name in known]
    if len(known) < len(DATATYPES):  # every input must come, and a request has either raw or typed contents
        with pytest.raises(grpc.RpcError) as refused:
            await remote.infer(InferRequest(DATATYPES_MODEL, inputs))
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_grpc_text(remote: InferenceGRPCClient) -> None:
    request = InferRequest(TEXT, [InferInput("text", [len(SENTENCES)], "BYTES", data=SENTENCES)])
    assert len((await remote.infer(request)).outputs[0].as_numpy()) == len(SENTENCES)


async def test_grpc_asks_and_finds_the_server(remote: InferenceGRPCClient) -> None:
    assert await remote.is_server_live()
    assert await remote.is_server_ready()
    assert await remote.is_model_ready(SEVERAL)
    for request, code in (
        (InferRequest(SEVERAL, [tensor("left", "FP32", LEFT, True)]), grpc.StatusCode.INVALID_ARGUMENT),
        (InferRequest("nobody", [tensor("x", "FP32", LEFT, True)]), grpc.StatusCode.NOT_FOUND),
    ):
        with pytest.raises(grpc.RpcError) as refused:
            await remote.infer(request)
        assert refused.value.code() is code
