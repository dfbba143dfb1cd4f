"""Large JSON: what is read at once is what the ordinary parser reads, and what is unusual is left to it."""

import json
import math
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contracts.artifact import Signature, TensorSpec
from contracts.errors import InvalidTensor, InvalidValue
from predictor.number_arrays import loads
from predictor.protocols import v1, v2
from predictor.tensors import bind, parse

LENGTH = 2000
FILL = " " * (16 << 10)
"""Makes any document a large one."""


def signature(dtype: str = "FP32", length: int | str = LENGTH) -> Signature:
    return Signature((TensorSpec("x", dtype, ("batch", length)),), (TensorSpec("y", dtype, ("batch", length)),))


def request(data: Any, dtype: str = "FP32", shape: tuple[int, ...] = (1, LENGTH)) -> bytes:
    return (json.dumps({"inputs": [{"name": "x", "shape": shape, "datatype": dtype, "data": data}]}) + FILL).encode()


def read(body: bytes, dtype: str = "FP32") -> np.ndarray:
    model = signature(dtype)
    return bind(v2.decode(body, None, model).given, model)["x"]


def plain(value: Any) -> Any:
    """Arrays as lists."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, dict):
        return {name: plain(member) for name, member in value.items()}
    return [plain(element) for element in value] if isinstance(value, list) else value


NUMBERS = st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    st.none() | st.booleans() | st.text(max_size=3) | NUMBERS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=2), inner, max_size=3)
        | st.tuples(st.integers(60, 70), inner).map(lambda pair: [pair[1]] * pair[0])
        | st.tuples(NUMBERS, NUMBERS, st.integers(60, 70)).map(lambda many: [many[0]] * many[2] + [many[1]])
    ),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(VALUES)
def test_a_document_reads_as_it_always_did(value: Any) -> None:
    body = orjson.dumps(value, option=orjson.OPT_NON_STR_KEYS) + FILL.encode()
    found = loads(body)
    assert found is None or plain(found) == orjson.loads(body)


def test_a_long_list_is_an_array_and_rows_are_a_list_of_them() -> None:
    numbers = [number / 7 for number in range(LENGTH)]
    found = loads(request(numbers))
    assert found is not None
    assert type(found["inputs"][0]["data"]) is np.ndarray
    rows = loads((json.dumps({"instances": [numbers, numbers]}) + FILL).encode())
    assert rows is not None
    assert [type(row) for row in rows["instances"]] == [np.ndarray, np.ndarray]


UNUSUAL = {
    "a list inside a list of numbers": '{"data": {"x": [1, 2, %s [3]]}}',
    "an empty list inside": '{"data": {"x": [1, 2, [3, 4], [], %s 5]}}',
    "a bracket in a text": '{"data": {"x": [1, 2, %s 3]}, "id": "["}',
    "a member twice": '{"data": {"x": [%s 3]}, "data": 1}',
    "an integer beyond 64 bits": '{"data": {"x": [1, %s 123456789012345678901234567890]}}',
    "a text among numbers": '{"data": {"x": [1, %s "2"]}}',
    "a boolean among numbers": '{"data": {"x": [1, %s true]}}',
    "a number that is none": '{"data": {"x": [1, %s NaN]}}',
}


@pytest.mark.parametrize("document", UNUSUAL.values(), ids=UNUSUAL)
def test_what_is_unusual_is_left_to_the_ordinary_parser(document: str) -> None:
    assert loads((document % ("0," * 100) + FILL).encode()) is None


@pytest.mark.parametrize("dtype", ["FP16", "FP32", "FP64"])
def test_floats_and_whole_numbers_arrive_exactly(dtype: str) -> None:
    expected = np.random.default_rng(1).standard_normal((1, LENGTH)).astype({"FP16": "f2", "FP32": "f4", "FP64": "f8"}[dtype])
    assert np.array_equal(read(request(expected.tolist()[0], dtype), dtype), expected)
    assert np.array_equal(read(request(expected.tolist(), dtype), dtype), expected)
    assert np.array_equal(read(request(list(range(LENGTH)), dtype), dtype)[0], np.arange(LENGTH))


@pytest.mark.parametrize("dtype", ["INT8", "UINT8", "INT16", "UINT16", "INT32", "UINT32", "INT64", "UINT64"])
def test_integers_arrive_up_to_their_limits(dtype: str) -> None:
    limits = np.iinfo(dtype.lower())
    values = [int(limits.min), int(limits.max)] * (LENGTH // 2)
    assert read(request(values, dtype), dtype).tolist() == [values]


WRONG = {
    "a fraction for a whole number": ("INT32", [0] * 1999 + [0.5], "takes only int values"),
    "too large": ("INT8", [0] * 1999 + [128], "does not fit INT8, got 128"),
    "negative where unsigned": ("UINT32", [0] * 1999 + [-1], "does not fit UINT32, got -1"),
    "too large for FP32": ("FP32", [0.5] * 1999 + [1e39], "does not fit FP32, got 1e+39"),
    "too many": ("FP32", [0.5] * 2001, "its 2000 values in a row"),
    "numbers for booleans": ("BOOL", [1] * 2000, "takes only bool values"),
    "ragged": ("FP32", [[0.5] * 1999, [0.5]], "ragged"),
    "ragged but as many": ("FP32", [[0.5] * 1000, [0.5] * 999, [0.5]], "ragged"),
}


@pytest.mark.parametrize(("dtype", "data", "reason"), WRONG.values(), ids=WRONG)
def test_the_same_errors_as_ever(dtype: str, data: Any, reason: str) -> None:
    with pytest.raises(InvalidTensor) as caught:
        read(request(data, dtype), dtype)
    assert reason in caught.value.message


def test_rows_of_different_length_are_ragged() -> None:
    body = (json.dumps({"instances": [[0.5] * 100, [0.5] * 101]}) + FILL).encode()
    with pytest.raises(InvalidTensor, match="ragged"):
        bind(v1.decode(parse(body), signature(length="n")), signature(length="n"))


def test_a_torn_document_is_named_by_the_ordinary_parser() -> None:
    with pytest.raises(InvalidValue, match="no JSON"):
        parse(request([0.5] * LENGTH).rstrip()[:-2])
    assert math.isclose(read(request([0.1] * LENGTH))[0, 0], 0.1, rel_tol=1e-6)
