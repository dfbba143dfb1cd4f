"""`tritonclient.grpc`, as its documentation has it."""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Iterator

import numpy as np
import pytest
from tritonclient.grpc import InferenceServerClient, InferInput, InferRequestedOutput, InferResult
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

PATIENCE_S = 60.0
Outcome = tuple[InferResult | None, InferenceServerException | None]


@pytest.fixture(scope="module")
def client(rpc: str) -> Iterator[InferenceServerClient]:
    with InferenceServerClient(rpc) as client:
        yield client


def tensor(name: str, datatype: str, values: np.ndarray) -> InferInput:
    given = InferInput(name, list(values.shape), datatype)
    given.set_data_from_numpy(values)
    return given


def several() -> list[InferInput]:
    return [tensor("left", "FP32", LEFT), tensor("right", "INT64", RIGHT)]


def test_several_inputs_and_outputs(client: InferenceServerClient) -> None:
    result = client.infer(SEVERAL, several(), request_id="seven", client_timeout=PATIENCE_S)
    for name, expected in (("sum", SUM), ("double", DOUBLE), ("positive", POSITIVE)):
        found = result.as_numpy(name)
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)
    assert result.get_response().id == "seven"
    assert result.get_response().model_name == SEVERAL


def test_requested_outputs_only(client: InferenceServerClient) -> None:
    result = client.infer(SEVERAL, several(), outputs=[InferRequestedOutput("positive")])
    assert [output.name for output in result.get_response().outputs] == ["positive"]
    np.testing.assert_array_equal(result.as_numpy("positive"), POSITIVE)


def test_every_datatype(client: InferenceServerClient) -> None:
    result = client.infer(DATATYPES_MODEL, [tensor(f"x_{name.lower()}", name, extremes(name)) for name in DATATYPES])
    for at, name in enumerate(DATATYPES):
        assert result.get_output(f"output_{at}").datatype == name
        np.testing.assert_array_equal(result.as_numpy(f"output_{at}"), extremes(name), err_msg=name)


def test_text(client: InferenceServerClient) -> None:
    together = client.infer(TEXT, [tensor("text", "BYTES", np.array([text.encode() for text in SENTENCES], np.object_))])
    name = together.get_response().outputs[0].name
    for text, row in zip(SENTENCES, together.as_numpy(name), strict=True):
        alone = client.infer(TEXT, [tensor("text", "BYTES", np.array([text.encode()], np.object_))])
        np.testing.assert_allclose(alone.as_numpy(name)[0], row, atol=1e-5)


def test_async_infer(client: InferenceServerClient) -> None:
    answers: queue.Queue[Outcome] = queue.Queue()
    values = {str(number): np.full((1, 5), number, np.float32) for number in range(16)}
    for key, value in values.items():
        client.async_infer(IDENTITY, [tensor("x", "FP32", value)], lambda result, error: answers.put((result, error)), request_id=key)
    for _ in list(values):
        result, error = answers.get(timeout=PATIENCE_S)
        assert error is None
        np.testing.assert_array_equal(result.as_numpy("y"), values.pop(result.get_response().id))


def test_a_stream_is_refused(client: InferenceServerClient) -> None:
    answers: queue.Queue[Outcome] = queue.Queue()
    client.start_stream(lambda result, error: answers.put((result, error)))
    try:
        with contextlib.suppress(InferenceServerException):  # the refusal may be there before the request
            client.async_stream_infer(IDENTITY, [tensor("x", "FP32", LEFT)])
        _, error = answers.get(timeout=PATIENCE_S)
        assert error.status() == "StatusCode.UNIMPLEMENTED"
    finally:
        client.stop_stream(cancel_requests=True)
    assert client.is_server_live()


def test_a_large_tensor(client: InferenceServerClient) -> None:
    values = np.random.default_rng(1).standard_normal((1, 150_528), dtype=np.float32)
    np.testing.assert_array_equal(client.infer(IDENTITY, [tensor("x", "FP32", values)]).as_numpy("y"), values)


def test_a_deadline(client: InferenceServerClient) -> None:
    values = np.zeros((1, 1 << 21), np.float32)  # gRPC counts deadlines in milliseconds: a small one might come back in time
    with pytest.raises(InferenceServerException) as late:
        client.infer(IDENTITY, [tensor("x", "FP32", values)], client_timeout=1e-6)
    # The second, when the call came through: admission refuses what cannot be answered in time.
    assert late.value.status() in ("StatusCode.DEADLINE_EXCEEDED", "StatusCode.RESOURCE_EXHAUSTED")


def test_the_one_version_may_be_named(client: InferenceServerClient) -> None:
    assert client.is_model_ready(SEVERAL, "1")
    np.testing.assert_array_equal(client.infer(SEVERAL, several(), model_version="1").as_numpy("sum"), SUM)
    with pytest.raises(InferenceServerException) as refused:
        client.infer(SEVERAL, several(), model_version="2")
    assert refused.value.status() == "StatusCode.NOT_FOUND"


def test_server_and_models_are_live_and_ready(client: InferenceServerClient) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready(IDENTITY)


def test_metadata(client: InferenceServerClient) -> None:
    assert "statistics" in client.get_server_metadata().extensions
    found = client.get_model_metadata(SEVERAL)
    assert (found.name, list(found.versions)) == (SEVERAL, ["1"])
    assert [(one.name, one.datatype, list(one.shape)) for one in found.inputs] == [("left", "FP32", [-1, 4]), ("right", "INT64", [-1, 4])]
    assert [(one.name, one.datatype) for one in found.outputs] == [("sum", "FP32"), ("double", "INT64"), ("positive", "BOOL")]
    assert ("text", "BYTES") in [(one.name, one.datatype) for one in client.get_model_metadata(TEXT).inputs]


def test_config(client: InferenceServerClient) -> None:
    found = client.get_model_config(SEVERAL, as_json=True)["config"]
    assert found["name"] == SEVERAL
    assert [(one["name"], one["data_type"], one["dims"]) for one in found["input"]] == [("left", "TYPE_FP32", ["4"]), ("right", "TYPE_INT64", ["4"])]


def test_index_load_unload(client: InferenceServerClient) -> None:
    def state() -> dict[str, str]:
        return {entry.name: entry.state for entry in client.get_model_repository_index().models}

    assert set(state()) == FUNCTIONS
    for _ in range(2):
        client.unload_model(SPARE)
        assert state()[SPARE] == "UNAVAILABLE"
        assert not client.is_model_ready(SPARE)
    with pytest.raises(InferenceServerException) as refused:
        client.infer(SPARE, [tensor("features", "FP32", np.zeros((1, 16), np.float32))])
    assert refused.value.status() == "StatusCode.UNAVAILABLE"
    for _ in range(2):
        client.load_model(SPARE)
        assert state()[SPARE] == "READY"
    assert client.infer(SPARE, [tensor("features", "FP32", np.zeros((1, 16), np.float32))]).get_response().outputs
    with pytest.raises(InferenceServerException) as refused:
        client.load_model(SPARE, config="{}")
    assert refused.value.status() == "StatusCode.INVALID_ARGUMENT"


def test_statistics(client: InferenceServerClient) -> None:
    def counted() -> tuple[int, int]:
        (found,) = client.get_inference_statistics(SEVERAL).model_stats
        return found.inference_count, found.inference_stats.success.count

    before = counted()
    client.infer(SEVERAL, [tensor("left", "FP32", np.repeat(LEFT, 3, 0)), tensor("right", "INT64", np.repeat(RIGHT, 3, 0))])
    after = counted()
    assert (after[0] - before[0], after[1] - before[1]) == (3, 1)
    assert {entry.name for entry in client.get_inference_statistics().model_stats} == FUNCTIONS


REFUSED = {
    "a shape that the model does not take": (
        SEVERAL,
        [("left", "FP32", np.zeros((1, 5), np.float32)), ("right", "INT64", RIGHT)],
        "INVALID_ARGUMENT",
    ),
    "another datatype": (SEVERAL, [("left", "FP64", LEFT.astype(np.float64)), ("right", "INT64", RIGHT)], "INVALID_ARGUMENT"),
    "an input too few": (SEVERAL, [("left", "FP32", LEFT)], "INVALID_ARGUMENT"),
    "an input twice": (IDENTITY, [("x", "FP32", LEFT), ("x", "FP32", LEFT)], "INVALID_ARGUMENT"),
    "a model that there is not": ("nobody", [("x", "FP32", LEFT)], "NOT_FOUND"),
}


@pytest.mark.parametrize(("name", "inputs", "status"), REFUSED.values(), ids=REFUSED.keys())
def test_refusals_say_why(client: InferenceServerClient, name: str, inputs: list[tuple[str, str, np.ndarray]], status: str) -> None:
    with pytest.raises(InferenceServerException) as refused:
        client.infer(name, [tensor(key, datatype, values) for key, datatype, values in inputs])
    assert refused.value.status() == f"StatusCode.{status}"
    assert refused.value.message()


def test_an_unknown_model_is_not_found_by_any_call(client: InferenceServerClient) -> None:
    for call in (client.get_model_metadata, client.get_model_config, client.get_inference_statistics, client.load_model, client.unload_model):
        with pytest.raises(InferenceServerException) as refused:
            call("nobody")
        assert refused.value.status() == "StatusCode.NOT_FOUND", call


def test_what_is_not_offered_is_unimplemented(client: InferenceServerClient) -> None:
    calls = (
        client.get_trace_settings,
        client.get_log_settings,
        client.get_system_shared_memory_status,
        client.get_cuda_shared_memory_status,
        lambda: client.register_system_shared_memory("region", "/region", 64),
    )
    for call in calls:
        with pytest.raises(InferenceServerException) as refused:
            call()
        assert refused.value.status() == "StatusCode.UNIMPLEMENTED"


def test_shared_memory_is_refused(client: InferenceServerClient) -> None:
    given = InferInput("x", [1, 4], "FP32")
    given.set_shared_memory("region", 16)
    with pytest.raises(InferenceServerException) as refused:
        client.infer(IDENTITY, [given])
    assert refused.value.status() == "StatusCode.INVALID_ARGUMENT"
