"""JSON to tensors and back: what fits arrives exactly, what does not fit is named."""

import contextlib
import json
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contracts.artifact import Signature, TensorSpec
from contracts.errors import InvalidTensor, InvalidValue
from predictor.protocols import v1, v2
from predictor.tensors import NUMPY, Given, bind, dump, parse


def one(dtype: str = "FP32", *shape: int | str) -> Signature:
    """A model of one input and one output, both like this."""
    shape = shape or ("batch", 2)
    return Signature((TensorSpec("x", dtype, shape),), (TensorSpec("y", dtype, shape),))


PAIR = Signature(
    (TensorSpec("a", "FP32", ("batch", 2)), TensorSpec("b", "INT64", ("batch",))),
    (TensorSpec("c", "FP32", ("batch", 2)), TensorSpec("d", "INT64", ("batch",))),
)
ALONE = Signature((TensorSpec("x", "FP32", ("n",)),), (TensorSpec("y", "FP32", ()),), batchable=False)


def decode_v1(document: object, signature: Signature) -> dict[str, Any]:
    return bind(v1.decode(document, signature), signature)


def decode_v2(document: object, signature: Signature) -> tuple[dict[str, Any], v2.Asked]:
    asked = v2.decode(json.dumps(document).encode(), None, signature)
    return bind(asked.given, signature), asked


def request(data: Any, shape: Any = (1, 2), datatype: Any = "FP32", name: Any = "x", **more: Any) -> dict[str, Any]:
    shape = list(shape) if isinstance(shape, tuple) else shape
    return {"inputs": [{"name": name, "shape": shape, "datatype": datatype, "data": data}], **more}


V1 = {
    "rows of arrays": (one(), {"instances": [[1, 2], [3, 4.5]]}, {"x": [[1, 2], [3, 4.5]]}),
    "rows of objects for one input": (one(), {"instances": [{"x": [1, 2]}]}, {"x": [[1, 2]]}),
    "rows of objects for several inputs": (PAIR, {"instances": [{"a": [1, 2], "b": 7}, {"b": 8, "a": [3, 4]}]}, {"a": [[1, 2], [3, 4]], "b": [7, 8]}),
    "the only row of a model without batches": (ALONE, {"instances": [[1, 2, 3]]}, {"x": [1, 2, 3]}),
    "booleans": (one("BOOL"), {"instances": [[True, False]]}, {"x": [[True, False]]}),
}


@pytest.mark.parametrize(("signature", "document", "expected"), V1.values(), ids=V1)
def test_v1_rows_become_inputs(signature: Signature, document: object, expected: dict[str, Any]) -> None:
    inputs = decode_v1(document, signature)
    assert {name: array.tolist() for name, array in inputs.items()} == expected
    assert {name: array.dtype for name, array in inputs.items()} == {spec.name: NUMPY[spec.dtype] for spec in signature.inputs}


V1_WRONG = {
    "no instances": (one(), {"inputs": []}, "instances"),
    "a bare list": (one(), [[1, 2]], "instances"),
    "no rows": (one(), {"instances": []}, "at least one row"),
    "ragged": (one(), {"instances": [[1, 2], [3]]}, "ragged"),
    "deeper in one row": (one(), {"instances": [[1, [2]], [3, 4]]}, "x: takes only float and int"),
    "text": (one(), {"instances": [["1", "2"]]}, "'1'"),
    "null": (one(), {"instances": [[None, 2]]}, "None"),
    "a boolean for a number": (one(), {"instances": [[True, 2]]}, "True"),
    "a fraction for a whole number": (one("INT64"), {"instances": [[1.5, 2]]}, "1.5"),
    "a number for a boolean": (one("BOOL"), {"instances": [[1, 0]]}, "takes only bool"),
    "too large a whole number": (one("INT8"), {"instances": [[1, 200]]}, "x: does not fit INT8, got 200"),
    "a negative unsigned number": (one("UINT8"), {"instances": [[-1, 2]]}, "does not fit UINT8, got -1"),
    "too large for FP32": (one(), {"instances": [[1e39, 2]]}, "does not fit FP32, got 1e+39"),
    "too large for FP16": (one("FP16"), {"instances": [[70000, 2]]}, "does not fit FP16"),
    "arrays where there are several inputs": (PAIR, {"instances": [[1, 2]]}, "a, b"),
    "an input is missing in one row": (PAIR, {"instances": [{"a": [1, 2], "b": 7}, {"a": [3, 4]}]}, "instances[1]"),
    "two rows where there are no batches": (ALONE, {"instances": [[1], [2]]}, "one row"),
}


@pytest.mark.parametrize(("signature", "document", "message"), V1_WRONG.values(), ids=V1_WRONG)
def test_v1_errors_name_what_is_wrong(signature: Signature, document: object, message: str) -> None:
    with pytest.raises(InvalidTensor) as caught:
        decode_v1(document, signature)
    assert message in caught.value.message


V2_WRONG = {
    "no inputs": ({"instances": [[1, 2]]}, "inputs"),
    "an input without a name": (request([1, 2], name=None), "inputs[0]"),
    "an unknown input": (request([1, 2], name="z"), "is no input of this model (inputs: x)"),
    "the same input twice": ({"inputs": request([1, 2])["inputs"] * 2}, "comes twice"),
    "another datatype": (request([1, 2], datatype="FP64"), "x.datatype: must be FP32, got 'FP64'"),
    "a shape that is none": (request([1, 2], shape=[1, -2]), "x.shape"),
    "a shape of text": (request([1, 2], shape="ab"), "x.shape"),
    "a boolean in the shape": (request([1, 2], shape=[True, 2]), "x.shape"),
    "too few values": (request([1]), "[1, 2]"),
    "nested otherwise than the shape says": (request([[1], [2]]), "[1, 2]"),
    "no data": (request(None), "x.data"),
    "ragged data": (request([[1, 2], [3]], shape=(2, 2)), "ragged"),
    "an id that is no text": (request([1, 2], id=7), "id"),
    "an unknown output": (request([1, 2], outputs=[{"name": "z"}]), "outputs: y"),
    "outputs that are no list": (request([1, 2], outputs="y"), "outputs: y"),
}


@pytest.mark.parametrize(("document", "message"), V2_WRONG.values(), ids=V2_WRONG)
def test_v2_errors_name_what_is_wrong(document: object, message: str) -> None:
    with pytest.raises(InvalidValue) as caught:
        decode_v2(document, one())
    assert message in caught.value.message


@pytest.mark.parametrize("data", [[1, 2, 3, 4], [[1, 2], [3, 4]]], ids=["flat", "nested"])
def test_v2_data_comes_flat_or_nested(data: list[Any]) -> None:
    inputs, asked = decode_v2(request(data, shape=(2, 2), id="7", outputs=[{"name": "y"}]), one())
    assert inputs["x"].tolist() == [[1, 2], [3, 4]]
    assert (asked.id, asked.outputs) == ("7", {"y": False})


def test_bytes_are_used_as_they_are_and_counted() -> None:
    raw = struct.pack("<2f", 1.5, float("nan"))
    inputs = bind([Given("x", [1, 2], "FP32", raw)], one())
    assert inputs["x"][0, 0] == 1.5
    assert np.isnan(inputs["x"][0, 1])
    assert np.shares_memory(inputs["x"], np.frombuffer(raw, np.uint8))
    with pytest.raises(InvalidTensor, match="must be 8 bytes"):
        bind([Given("x", [1, 2], "FP32", raw[1:])], one())


def test_the_bytes_of_a_boolean_are_0_and_1() -> None:
    assert bind([Given("x", [1, 2], "BOOL", b"\1\0")], one("BOOL"))["x"].tolist() == [[True, False]]
    with pytest.raises(InvalidTensor, match="bytes of 0 and 1, got 2"):
        bind([Given("x", [1, 2], "BOOL", b"\1\2")], one("BOOL"))


TYPED = {
    "as wide as the field": ("INT32", np.int32([-(2**31), 2**31 - 1]), None),
    "narrower and within": ("INT8", np.int32([-128, 127]), None),
    "narrower and beyond": ("INT8", np.int32([0, 128]), "does not fit INT8, got 128"),
    "below": ("INT16", np.int32([-32769, 0]), "does not fit INT16, got -32769"),
    "unsigned and beyond": ("UINT16", np.uint32([0, 65536]), "does not fit UINT16, got 65536"),
    "not finite": ("FP32", np.float32([np.nan, np.inf]), None),
}


@pytest.mark.parametrize(("dtype", "values", "error"), TYPED.values(), ids=TYPED)
def test_values_of_a_wider_type_must_fit(dtype: str, values: Any, error: str | None) -> None:
    given = [Given("x", [1, 2], dtype, values)]
    if error is None:
        array = bind(given, one(dtype))["x"]
        assert array.dtype == NUMPY[dtype]
        assert np.array_equal(array.reshape(-1), values, equal_nan=values.dtype.kind == "f")
    else:
        with pytest.raises(InvalidTensor, match=error):
            bind(given, one(dtype))


def v2_answer(asked: v2.Asked, outputs: Any, signature: Signature) -> Any:
    body, json_bytes = v2.encode("m", asked, outputs, signature, {"p": 1})
    assert json_bytes is None
    return json.loads(body)


DTYPES = [name for name in NUMPY if name != "BF16"]


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(DTYPES), st.integers(0, 2**32 - 1), st.integers(1, 4))
def test_every_value_survives_the_way_in_and_out(dtype: str, seed: int, rows: int) -> None:
    rng = np.random.default_rng(seed)
    kind = NUMPY[dtype]
    sample = rng.bytes(rows * 2 * kind.itemsize)
    array = np.frombuffer(sample, kind).reshape(rows, 2) if dtype != "BOOL" else rng.integers(0, 2, (rows, 2)).astype(bool)
    array = np.nan_to_num(array, posinf=1, neginf=-1) if kind.kind == "f" else array
    signature = one(dtype)
    first = json.loads(dump(v1.encode({"y": array}, signature)))
    assert np.array_equal(decode_v1({"instances": first["predictions"]}, signature)["x"], array)
    second = v2_answer(v2.Asked([], "7", {"q": 2}, {"y": False}), {"y": array}, signature)
    assert (second["model_name"], second["id"], second["parameters"]) == ("m", "7", {"q": 2, "p": 1})
    (tensor,) = second["outputs"]
    back, _ = decode_v2(request(tensor["data"], tensor["shape"], tensor["datatype"]), signature)
    assert np.array_equal(back["x"], array)


BF16 = {"exact": (1.5, 0x3FC0), "to nearest": (1.005, 0x3F81), "ties to even, down": (1.00390625, 0x3F80), "ties to even, up": (1.01171875, 0x3F82)}


@pytest.mark.parametrize(("value", "bits"), BF16.values(), ids=BF16)
def test_bf16_is_kept_as_its_bits(value: float, bits: int) -> None:
    signature = one("BF16", "batch")
    array = decode_v1({"instances": [value]}, signature)["x"]
    assert array.tolist() == [bits]
    assert json.loads(dump(v1.encode({"y": array}, signature))) == {"predictions": [struct.unpack("<f", struct.pack("<I", bits << 16))[0]]}


def test_several_outputs_make_rows_of_objects_and_only_the_wanted_ones_leave_v2() -> None:
    outputs: dict[str, Any] = {"c": np.array([[1, 2], [3, 4]], np.float32), "d": np.array([7, 8])}
    assert json.loads(dump(v1.encode(outputs, PAIR))) == {"predictions": [{"c": [1, 2], "d": 7}, {"c": [3, 4], "d": 8}]}
    answer = v2_answer(v2.Asked([], None, {}, {"d": False}), outputs, PAIR)
    assert answer["outputs"] == [{"name": "d", "shape": [2], "datatype": "INT64", "data": [7, 8]}]
    assert "id" not in answer


def test_the_scalar_of_a_model_without_batches_is_one_prediction() -> None:
    assert json.loads(dump(v1.encode({"y": np.array(2.5, np.float32)}, ALONE))) == {"predictions": [2.5]}


def test_what_is_not_finite_goes_out_as_null() -> None:
    assert json.loads(dump(v1.encode({"y": np.array([[np.nan, np.inf]], np.float32)}, one()))) == {"predictions": [[None, None]]}


@settings(max_examples=200, deadline=None)
@given(
    st.binary(max_size=60)
    | st.recursive(
        st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.dictionaries(st.sampled_from(["instances", "inputs", "x", "name", "shape", "data", "datatype", "id", "outputs"]), inner, max_size=4)
        ),
        max_leaves=20,
    ).map(lambda value: json.dumps(value).encode())
)
def test_no_body_gives_anything_but_inputs_or_an_error_for_its_sender(body: bytes) -> None:
    with contextlib.suppress(InvalidValue):
        decode_v1(parse(body), PAIR)
    with contextlib.suppress(InvalidValue):
        bind(v2.decode(body, None, PAIR).given, PAIR)
