"""`tritonclient.http`, as its documentation has it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput
from tritonclient.utils import InferenceServerException

from tests.protocol.outside.expected import (
    DATATYPES,
    DATATYPES_MODEL,
    DOUBLE,
    FUNCTIONS,
    IDENTITY,
    LEFT,
    POSITIVE,
    RIGHT,
    SENTENCES,
    SEVERAL,
    SPARE,
    SUM,
    TEXT,
    extremes,
)


@pytest.fixture(scope="module")
def client(http: str) -> Iterator[InferenceServerClient]:
    with InferenceServerClient(http, concurrency=8, connection_timeout=60, network_timeout=60) as client:
        yield client


def tensor(name: str, datatype: str, values: np.ndarray, binary: bool = True) -> InferInput:
    given = InferInput(name, list(values.shape), datatype)
    given.set_data_from_numpy(values, binary_data=binary)
    return given


def several(binary: bool = True) -> list[InferInput]:
    return [tensor("left", "FP32", LEFT, binary), tensor("right", "INT64", RIGHT, binary)]


@pytest.mark.parametrize("binary_in", [True, False], ids=["binary in", "JSON in"])
@pytest.mark.parametrize("binary_out", [True, False], ids=["binary out", "JSON out"])
def test_several_inputs_and_outputs(client: InferenceServerClient, binary_in: bool, binary_out: bool) -> None:
    outputs = [InferRequestedOutput(name, binary_data=binary_out) for name in ("sum", "double", "positive")]
    result = client.infer(SEVERAL, several(binary_in), outputs=outputs, request_id="seven")
    for name, expected in (("sum", SUM), ("double", DOUBLE), ("positive", POSITIVE)):
        found = result.as_numpy(name)
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)
    assert result.get_response()["id"] == "seven"
    assert result.get_response()["model_name"] == SEVERAL


def test_binary_and_json_inputs_and_outputs_in_one_request(client: InferenceServerClient) -> None:
    inputs = [tensor("left", "FP32", LEFT, True), tensor("right", "INT64", RIGHT, False)]
    outputs = [InferRequestedOutput("double", binary_data=True), InferRequestedOutput("positive", binary_data=False)]
    result = client.infer(SEVERAL, inputs, outputs=outputs)
    np.testing.assert_array_equal(result.as_numpy("double"), DOUBLE)
    np.testing.assert_array_equal(result.as_numpy("positive"), POSITIVE)
    assert result.get_output("sum") is None


def test_without_requested_outputs_all_come(client: InferenceServerClient) -> None:
    result = client.infer(SEVERAL, several())
    assert [output["name"] for output in result.get_response()["outputs"]] == ["sum", "double", "positive"]
    np.testing.assert_array_equal(result.as_numpy("sum"), SUM)


@pytest.mark.parametrize("binary", [True, False], ids=["binary", "JSON"])
def test_every_datatype(client: InferenceServerClient, binary: bool) -> None:
    inputs = [tensor(f"x_{name.lower()}", name, extremes(name), binary or name in ("BF16", "FP16")) for name in DATATYPES]
    result = client.infer(DATATYPES_MODEL, inputs, outputs=[InferRequestedOutput(f"output_{at}", binary_data=True) for at in range(len(DATATYPES))])
    for at, name in enumerate(DATATYPES):
        assert result.get_output(f"output_{at}")["datatype"] == name
        np.testing.assert_array_equal(result.as_numpy(f"output_{at}"), extremes(name), err_msg=name)


@pytest.mark.parametrize("binary", [True, False], ids=["binary", "JSON"])
def test_text(client: InferenceServerClient, binary: bool) -> None:
    together = client.infer(TEXT, [tensor("text", "BYTES", np.array([text.encode() for text in SENTENCES], np.object_), binary)])
    name = together.get_response()["outputs"][0]["name"]
    rows = together.as_numpy(name)
    assert len(rows) == len(SENTENCES)
    for text, row in zip(SENTENCES, rows, strict=True):
        alone = client.infer(TEXT, [tensor("text", "BYTES", np.array([text.encode()], np.object_), binary)])
        np.testing.assert_allclose(alone.as_numpy(name)[0], row, atol=1e-5)


def test_async_infer(client: InferenceServerClient) -> None:
    values = [np.full((1, 5), number, np.float32) for number in range(16)]
    waiting = [client.async_infer(IDENTITY, [tensor("x", "FP32", value)]) for value in values]
    for value, request in zip(values, waiting, strict=True):
        np.testing.assert_array_equal(request.get_result().as_numpy("y"), value)


def test_a_large_tensor(client: InferenceServerClient) -> None:
    values = np.random.default_rng(1).standard_normal((1, 150_528), dtype=np.float32)
    np.testing.assert_array_equal(client.infer(IDENTITY, [tensor("x", "FP32", values)]).as_numpy("y"), values)


def test_the_one_version_may_be_named(client: InferenceServerClient) -> None:
    assert client.is_model_ready(SEVERAL, "1")
    np.testing.assert_array_equal(client.infer(SEVERAL, several(), model_version="1").as_numpy("sum"), SUM)
    with pytest.raises(InferenceServerException) as refused:
        client.infer(SEVERAL, several(), model_version="2")
    assert refused.value.status() == "404"


def test_server_and_models_are_live_and_ready(client: InferenceServerClient) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready(IDENTITY)
    assert not client.is_model_ready("nobody")


def test_metadata(client: InferenceServerClient) -> None:
    assert "binary_tensor_data" in client.get_server_metadata()["extensions"]
    found = client.get_model_metadata(SEVERAL)
    assert found["name"] == SEVERAL
    assert found["versions"] == ["1"]
    assert [(one["name"], one["datatype"], one["shape"]) for one in found["inputs"]] == [("left", "FP32", [-1, 4]), ("right", "INT64", [-1, 4])]
    assert [(one["name"], one["datatype"]) for one in found["outputs"]] == [("sum", "FP32"), ("double", "INT64"), ("positive", "BOOL")]
    assert ("text", "BYTES") in [(one["name"], one["datatype"]) for one in client.get_model_metadata(TEXT)["inputs"]]


def test_config(client: InferenceServerClient) -> None:
    found = client.get_model_config(SEVERAL)
    assert found["name"] == SEVERAL
    assert found["max_batch_size"] >= 1
    assert [(one["name"], one["data_type"], one["dims"]) for one in found["input"]] == [("left", "TYPE_FP32", [4]), ("right", "TYPE_INT64", [4])]


def test_index_load_unload(client: InferenceServerClient) -> None:
    def state() -> dict[str, str]:
        return {entry["name"]: entry["state"] for entry in client.get_model_repository_index()}

    assert set(state()) == FUNCTIONS
    for _ in range(2):
        client.unload_model(SPARE)
        assert state()[SPARE] == "UNAVAILABLE"
        assert not client.is_model_ready(SPARE)
    with pytest.raises(InferenceServerException) as refused:
        client.infer(SPARE, [tensor("features", "FP32", np.zeros((1, 16), np.float32))])
    assert refused.value.status() == "503"
    for _ in range(2):
        client.load_model(SPARE)
        assert state()[SPARE] == "READY"
        assert client.is_model_ready(SPARE)
    assert client.infer(SPARE, [tensor("features", "FP32", np.zeros((1, 16), np.float32))]).get_response()["outputs"]
    with pytest.raises(InferenceServerException, match="config"):
        client.load_model(SPARE, config="{}")


def test_statistics(client: InferenceServerClient) -> None:
    def counted() -> tuple[int, int]:
        (found,) = client.get_inference_statistics(SEVERAL)["model_stats"]
        assert found["name"] == SEVERAL
        return found["inference_count"], found["inference_stats"]["success"]["count"]

    before = counted()
    client.infer(SEVERAL, [tensor("left", "FP32", np.repeat(LEFT, 3, 0)), tensor("right", "INT64", np.repeat(RIGHT, 3, 0))])
    after = counted()
    assert (after[0] - before[0], after[1] - before[1]) == (3, 1)
    assert {entry["name"] for entry in client.get_inference_statistics()["model_stats"]} == FUNCTIONS


REFUSED = {
    "a shape that the model does not take": (SEVERAL, [("left", "FP32", np.zeros((1, 5), np.float32)), ("right", "INT64", RIGHT)], "400"),
    "another datatype": (SEVERAL, [("left", "FP64", LEFT.astype(np.float64)), ("right", "INT64", RIGHT)], "400"),
    "an input too few": (SEVERAL, [("left", "FP32", LEFT)], "400"),
    "an input that there is not": (IDENTITY, [("x", "FP32", LEFT), ("other", "FP32", LEFT)], "400"),
    "an input twice": (IDENTITY, [("x", "FP32", LEFT), ("x", "FP32", LEFT)], "400"),
    "a model that there is not": ("nobody", [("x", "FP32", LEFT)], "404"),
}


@pytest.mark.parametrize(("name", "inputs", "status"), REFUSED.values(), ids=REFUSED.keys())
@pytest.mark.parametrize("binary", [True, False], ids=["binary", "JSON"])
def test_refusals_say_why(client: InferenceServerClient, name: str, inputs: list[tuple[str, str, np.ndarray]], status: str, binary: bool) -> None:
    with pytest.raises(InferenceServerException) as refused:
        client.infer(name, [tensor(key, datatype, values, binary) for key, datatype, values in inputs])
    assert refused.value.status() == status
    assert refused.value.message()


def test_an_output_that_there_is_not(client: InferenceServerClient) -> None:
    with pytest.raises(InferenceServerException) as refused:
        client.infer(SEVERAL, several(), outputs=[InferRequestedOutput("nothing")])
    assert refused.value.status() == "400"


def test_what_is_not_offered_is_refused(client: InferenceServerClient) -> None:
    calls = (
        client.get_trace_settings,
        client.get_log_settings,
        client.get_system_shared_memory_status,
        client.get_cuda_shared_memory_status,
        lambda: client.register_system_shared_memory("region", "/region", 64),
        lambda: client.update_log_settings({"log_info": True}),
        lambda: client.infer(IDENTITY, [shared_memory_input()]),
        lambda: client.infer(IDENTITY, [tensor("x", "FP32", LEFT)], request_compression_algorithm="gzip"),
    )
    for call in calls:
        with pytest.raises(InferenceServerException) as refused:
            call()
        assert refused.value.status() in ("400", "404", "415", "501"), refused.value


def shared_memory_input() -> InferInput:
    given = InferInput("x", [1, 4], "FP32")
    given.set_shared_memory("region", 16)
    return given
