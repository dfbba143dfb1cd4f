"""V2 with binary tensor data: any mix of JSON and bytes, both ways, and no length that lies gets through."""

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contracts.artifact import Signature, TensorSpec
from contracts.errors import InvalidValue
from predictor.protocols import v2
from predictor.tensors import NUMPY, bind

PAIR = Signature(
    (TensorSpec("a", "FP32", ("batch", 2)), TensorSpec("b", "INT64", ("batch",))),
    (TensorSpec("c", "FP32", ("batch", 2)), TensorSpec("d", "INT64", ("batch",))),
)
A, B = np.array([[1, 2]], np.float32), np.array([7])


def tensor(name: str, array: Any, binary: bool, **more: Any) -> dict[str, Any]:
    data = {"parameters": {"binary_data_size": array.nbytes}} if binary else {"data": array.ravel().tolist()}
    return {"name": name, "shape": list(array.shape), "datatype": "FP32" if array.dtype == np.float32 else "INT64", **data, **more}


def message(document: Any, *binary: bytes) -> tuple[bytes, int]:
    head = json.dumps(document).encode()
    return head + b"".join(binary), len(head)


@pytest.mark.parametrize("binary_a", [True, False], ids=["a binary", "a JSON"])
@pytest.mark.parametrize("binary_b", [True, False], ids=["b binary", "b JSON"])
def test_binary_and_json_inputs_mix(binary_a: bool, binary_b: bool) -> None:
    inputs = [tensor("b", B, binary_b), tensor("a", A, binary_a)]
    tail = [array.tobytes() for array, binary in ((B, binary_b), (A, binary_a)) if binary]
    asked = v2.decode(*message({"id": "7", "inputs": inputs, "parameters": {"p": 1}}, *tail), PAIR)
    found = bind(asked.given, PAIR)
    assert np.array_equal(found["a"], A)
    assert np.array_equal(found["b"], B)
    assert (asked.id, asked.parameters) == ("7", {"p": 1})


def test_a_binary_input_is_not_copied() -> None:
    body, head = message({"inputs": [tensor("b", B, True), tensor("a", A, True)]}, B.tobytes(), A.tobytes())
    whole = np.frombuffer(body, np.uint8)
    assert all(np.shares_memory(array, whole) for array in bind(v2.decode(body, head, PAIR).given, PAIR).values())


OUTPUTS = {
    "all as JSON": ({}, {"c": False, "d": False}),
    "all binary": ({"parameters": {"binary_data_output": True}}, {"c": True, "d": True}),
    "one asked for": ({"outputs": [{"name": "d"}]}, {"d": False}),
    "one of each": (
        {"outputs": [{"name": "d", "parameters": {"binary_data": False}}, {"name": "c"}], "parameters": {"binary_data_output": True}},
        {"d": False, "c": True},
    ),
    "none is all": ({"outputs": []}, {"c": False, "d": False}),
}


@pytest.mark.parametrize(("document", "wanted"), OUTPUTS.values(), ids=OUTPUTS)
def test_outputs_come_as_they_were_asked_for(document: dict[str, Any], wanted: dict[str, bool]) -> None:
    body, head = message({"inputs": [tensor("a", A, False)], **document})
    asked = v2.decode(body, head, PAIR)
    assert asked.outputs == wanted
    results = {"c": A, "d": B}
    answer, json_bytes = v2.encode("m", asked, results, PAIR, {"q": 2})
    found = json.loads(answer[:json_bytes])
    assert [one["name"] for one in found["outputs"]] == list(wanted)
    assert found["parameters"] == {"q": 2}
    tail = answer[len(answer) if json_bytes is None else json_bytes :]
    assert (json_bytes is None) == (not any(wanted.values()))
    for one in found["outputs"]:
        array = results[one["name"]]
        if wanted[one["name"]]:
            size = one["parameters"]["binary_data_size"]
            assert tail[:size] == array.tobytes()
            tail = tail[size:]
        else:
            assert one["data"] == array.ravel().tolist()
    assert not tail


WRONG = {
    "a header longer than the body": ({"inputs": []}, (), 1000, "Inference-Header-Content-Length"),
    "a header that ends inside the JSON": ({"inputs": []}, (), -1, "no JSON"),
    "no header at all": ({"inputs": [tensor("a", A, True)]}, (A.tobytes(),), None, "no JSON"),
    "bytes that no input takes": ({"inputs": [tensor("a", A, True)]}, (A.tobytes(), b"x"), 0, "the inputs take 8 bytes of it, got '9 bytes'"),
    "fewer bytes than the inputs take": ({"inputs": [tensor("a", A, True)]}, (A.tobytes()[1:],), 0, "at most the 7 that are left, got 8"),
    "a size that the shape denies": ({"inputs": [{**tensor("a", A, True), "shape": [1, 3]}]}, (A.tobytes(),), 0, "must be 12 bytes for FP32[1, 3]"),
    "a negative size": ({"inputs": [tensor("a", A, True, parameters={"binary_data_size": -8})]}, (A.tobytes(),), 0, "binary_data_size"),
    "a size that is text": ({"inputs": [tensor("a", A, True, parameters={"binary_data_size": "8"})]}, (A.tobytes(),), 0, "binary_data_size"),
    "a size that is a boolean": ({"inputs": [tensor("a", A, True, parameters={"binary_data_size": True})]}, (b"x",), 0, "binary_data_size"),
    "data beside the bytes": ({"inputs": [tensor("a", A, True, data=[1, 2])]}, (A.tobytes(),), 0, "must not be there beside binary data"),
    "an input in the memory of its client": (
        {"inputs": [tensor("a", A, True, parameters={"shared_memory_region": "r", "shared_memory_byte_size": 8})]},
        (),
        0,
        "a.data: must be a list",
    ),
    "a flag that is none": ({"inputs": [], "parameters": {"binary_data_output": 1}}, (), 0, "must be true or false"),
    "parameters that are a list": ({"inputs": [], "parameters": []}, (), 0, "parameters: must be an object"),
    "classes instead of values": ({"inputs": [], "outputs": [{"name": "c", "parameters": {"classification": 3}}]}, (), 0, "is not served here"),
    "more elements than memory has": ({"inputs": [{**tensor("a", A, True), "shape": [0, 2**62]}]}, (A.tobytes(),), 0, "larger than any tensor"),
}


@pytest.mark.parametrize(("document", "tail", "off", "reason"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_named(document: Any, tail: tuple[bytes, ...], off: int | None, reason: str) -> None:
    body, head = message(document, *tail)
    with pytest.raises(InvalidValue) as caught:
        bind(v2.decode(body, None if off is None else head + off, PAIR).given, PAIR)
    assert reason in caught.value.message


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=80), st.integers(0, 90), st.sampled_from([8, 0, -1, 4, 16, 2**70, 1.5, None]), st.lists(st.integers(-1, 4), max_size=3))
def test_no_body_gives_anything_but_inputs_or_an_error_for_its_sender(tail: bytes, head: int, size: Any, shape: list[int]) -> None:
    document = {"inputs": [{"name": "a", "shape": shape, "datatype": "FP32", "parameters": {"binary_data_size": size}}]}
    for body, length in ((tail, head), message(document, tail)):
        try:
            found = bind(v2.decode(body, length, PAIR).given, PAIR)
        except InvalidValue:
            continue
        assert list(found["a"].shape) == shape
        assert found["a"].nbytes == size == len(tail)


@pytest.mark.parametrize("dtype", NUMPY)
def test_every_datatype_goes_in_and_out_as_bytes(dtype: str) -> None:
    signature = Signature((TensorSpec("x", dtype, ("batch", 3)),), (TensorSpec("y", dtype, ("batch", 3)),))
    raw = bytes([0, 1, 1, 0, 1, 0]) if dtype == "BOOL" else np.random.default_rng(1).bytes(6 * NUMPY[dtype].itemsize)
    entry = {"name": "x", "shape": [2, 3], "datatype": dtype, "parameters": {"binary_data_size": len(raw)}}
    asked = v2.decode(*message({"inputs": [entry], "parameters": {"binary_data_output": True}}, raw), signature)
    answer, json_bytes = v2.encode("m", asked, {"y": bind(asked.given, signature)["x"]}, signature, {})
    assert answer[json_bytes:] == raw
