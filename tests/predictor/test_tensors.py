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
from predictor.tensors import NUMPY, add_input, decode_v1, decode_v2, dump, encode_v1, encode_v2, parse


def one(dtype: str = "FP32", *shape: int | str) -> Signature:
    """A model of one input and one output, both like this."""
    shape = shape or ("batch", 2)
    return Signature((TensorSpec("x", dtype, shape),), (TensorSpec("y", dtype, shape),))


PAIR = Signature(
    (TensorSpec("a", "FP32", ("batch", 2)), TensorSpec("b", "INT64", ("batch",))),
    (TensorSpec("c", "FP32", ("batch", 2)), TensorSpec("d", "INT64", ("batch",))),
)
ALONE = Signature((TensorSpec("x", "FP32", ("n",)),), (TensorSpec("y", "FP32", ()),), batchable=False)


def v2(data: Any, shape: Any = (1, 2), datatype: Any = "FP32", name: Any = "x", **more: Any) -> dict[str, Any]:
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
    "an input without a name": (v2([1, 2], name=None), "inputs[0]"),
    "an unknown input": (v2([1, 2], name="z"), "is no input of this model (inputs: x)"),
    "the same input twice": ({"inputs": v2([1, 2])["inputs"] * 2}, "comes twice"),
    "another datatype": (v2([1, 2], datatype="FP64"), "x.datatype: must be FP32, got 'FP64'"),
    "a shape that is none": (v2([1, 2], shape=[1, -2]), "x.shape"),
    "a shape of text": (v2([1, 2], shape="ab"), "x.shape"),
    "a boolean in the shape": (v2([1, 2], shape=[True, 2]), "x.shape"),
    "too few values": (v2([1]), "[1, 2]"),
    "nested otherwise than the shape says": (v2([[1], [2]]), "[1, 2]"),
    "no data": (v2(None), "x.data"),
    "ragged data": (v2([[1, 2], [3]], shape=(2, 2)), "ragged"),
    "an id that is no text": (v2([1, 2], id=7), "id"),
    "an unknown output": (v2([1, 2], outputs=[{"name": "z"}]), "outputs: y"),
    "outputs that are no list": (v2([1, 2], outputs="y"), "outputs: y"),
}


@pytest.mark.parametrize(("document", "message"), V2_WRONG.values(), ids=V2_WRONG)
def test_v2_errors_name_what_is_wrong(document: object, message: str) -> None:
    with pytest.raises(InvalidValue) as caught:
        decode_v2(document, one())
    assert message in caught.value.message


@pytest.mark.parametrize("data", [[1, 2, 3, 4], [[1, 2], [3, 4]]], ids=["flat", "nested"])
def test_v2_data_comes_flat_or_nested(data: list[Any]) -> None:
    asked = decode_v2(v2(data, shape=(2, 2), id="7", outputs=[{"name": "y"}]), one())
    assert asked.inputs["x"].tolist() == [[1, 2], [3, 4]]
    assert (asked.id, asked.outputs) == ("7", ("y",))


def test_bytes_are_used_as_they_are_and_counted() -> None:
    inputs: dict[str, Any] = {}
    add_input(inputs, one(), "x", [1, 2], "FP32", struct.pack("<2f", 1.5, float("nan")))
    assert inputs["x"][0, 0] == 1.5
    assert np.isnan(inputs["x"][0, 1])
    with pytest.raises(InvalidTensor, match="must be 8 bytes"):
        add_input({}, one(), "x", [1, 2], "FP32", b"\0" * 7)


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
    first = json.loads(dump(encode_v1({"y": array}, signature)))
    assert np.array_equal(decode_v1({"instances": first["predictions"]}, signature)["x"], array)
    second = json.loads(dump(encode_v2("m", "7", {"y": array}, signature, None, {"p": 1})))
    assert (second["model_name"], second["id"], second["parameters"]) == ("m", "7", {"p": 1})
    (tensor,) = second["outputs"]
    back = decode_v2(v2(tensor["data"], tensor["shape"], tensor["datatype"]), signature)
    assert np.array_equal(back.inputs["x"], array)


BF16 = {"exact": (1.5, 0x3FC0), "to nearest": (1.005, 0x3F81), "ties to even, down": (1.00390625, 0x3F80), "ties to even, up": (1.01171875, 0x3F82)}


@pytest.mark.parametrize(("value", "bits"), BF16.values(), ids=BF16)
def test_bf16_is_kept_as_its_bits(value: float, bits: int) -> None:
    signature = one("BF16", "batch")
    array = decode_v1({"instances": [value]}, signature)["x"]
    assert array.tolist() == [bits]
    assert json.loads(dump(encode_v1({"y": array}, signature))) == {"predictions": [struct.unpack("<f", struct.pack("<I", bits << 16))[0]]}


def test_several_outputs_make_rows_of_objects_and_only_the_wanted_ones_leave_v2() -> None:
    outputs: dict[str, Any] = {"c": np.array([[1, 2], [3, 4]], np.float32), "d": np.array([7, 8])}
    assert json.loads(dump(encode_v1(outputs, PAIR))) == {"predictions": [{"c": [1, 2], "d": 7}, {"c": [3, 4], "d": 8}]}
    answer = json.loads(dump(encode_v2("m", None, outputs, PAIR, ("d",), {})))
    assert answer["outputs"] == [{"name": "d", "shape": [2], "datatype": "INT64", "data": [7, 8]}]
    assert "id" not in answer


def test_the_scalar_of_a_model_without_batches_is_one_prediction() -> None:
    assert json.loads(dump(encode_v1({"y": np.array(2.5, np.float32)}, ALONE))) == {"predictions": [2.5]}


def test_what_is_not_finite_goes_out_as_null() -> None:
    assert json.loads(dump(encode_v1({"y": np.array([[np.nan, np.inf]], np.float32)}, one()))) == {"predictions": [[None, None]]}


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
    for decode in (decode_v1, decode_v2):
        with contextlib.suppress(InvalidValue):
            decode(parse(body), PAIR)
