"""Values from outside to numpy, and numpy to values for outside: one way in for every protocol.

Owns the check that data fit the datatype and shape that a request claims for them. Pure: no sockets, no shared memory, no kserve. What does not fit
the model is an InvalidTensor that says which tensor, which value, and what the model takes. In JSON, booleans, numbers and text are never taken for
one another, and a number that its datatype cannot hold is an error rather than infinity. JSON has no NaN: none can come in, and what is not finite
goes out as null.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import orjson

from contracts.artifact import DTYPE_BYTES, Signature, TensorSpec
from contracts.errors import InvalidTensor, InvalidValue
from predictor import number_arrays

Array = npt.NDArray[np.generic]

NUMPY: Mapping[str, np.dtype[np.generic]] = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype(np.uint8),
    "UINT16": np.dtype(np.uint16),
    "UINT32": np.dtype(np.uint32),
    "UINT64": np.dtype(np.uint64),
    "INT8": np.dtype(np.int8),
    "INT16": np.dtype(np.int16),
    "INT32": np.dtype(np.int32),
    "INT64": np.dtype(np.int64),
    "FP16": np.dtype(np.float16),
    "FP32": np.dtype(np.float32),
    "FP64": np.dtype(np.float64),
    "BF16": np.dtype(np.uint16),
}
"""Open Inference Protocol datatype -> the numpy type it is stored as. numpy has no BF16: its 16 bits are kept as they are."""

_MAX_DIMS = 32
_BOOLEANS, _INTEGERS, _NUMBERS = frozenset({bool}), frozenset({int}), frozenset({int, float})
_MAX_ELEMENTS = 1 << 40
_short = reprlib.Repr()
_short.maxlevel = 3
_JSON_OPTIONS = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS


NESTED = object()
"""The shape of a tensor whose request claims none, and no datatype: the nesting of its values gives it (V1)."""


class Given(NamedTuple):
    """One input as a request brings it, whatever protocol it came by.

    `data` is a list of JSON values (flat in row-major order, or nested); a buffer of the elements in row-major order, little endian, which is used
    without a copy; or an array of a wider type of the same kind (gRPC's typed contents).
    """

    name: str
    shape: object
    datatype: object
    data: object


def parse(body: bytes | memoryview) -> Any:
    """The JSON value of a body, with long lists of numbers as arrays; InvalidValue says where it breaks."""
    if (document := number_arrays.loads(body)) is not None:
        return document
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidValue(f"the body is no JSON: {error}") from None


def dump(value: object) -> bytes:
    """JSON of an answer, arrays included."""
    return orjson.dumps(value, option=_JSON_OPTIONS)


def bind(given: Iterable[Given], signature: Signature) -> dict[str, Array]:
    """Input name -> array of the input's own type; every decoded request of every protocol comes through here."""
    inputs: dict[str, Array] = {}
    for one in given:
        spec = find(signature, one.name)
        if one.name in inputs:
            raise InvalidTensor("comes twice", key="inputs", value=one.name)
        inputs[one.name] = _array(one.data, spec) if one.shape is NESTED else _claimed(one, spec)
    return inputs


def find(signature: Signature, name: str) -> TensorSpec:
    """The input of this name."""
    for spec in signature.inputs:
        if spec.name == name:
            return spec
    known = ", ".join(spec.name for spec in signature.inputs)
    raise InvalidTensor(f"is no input of this model (inputs: {known})", key="inputs", value=shown(name))


def _claimed(given: Given, spec: TensorSpec) -> Array:
    """A tensor of V2, which says its shape and datatype itself."""
    name, shape, datatype, data = given
    if not isinstance(shape, list) or len(shape) > _MAX_DIMS or not all(type(size) is int and size >= 0 for size in shape):
        raise InvalidTensor("must be a list of whole numbers", key=f"{name}.shape", value=shown(shape))
    if math.prod(size or 1 for size in shape) > _MAX_ELEMENTS:
        raise InvalidTensor("is larger than any tensor", key=f"{name}.shape", value=shown(shape))
    if datatype != spec.dtype:
        raise InvalidTensor(f"must be {spec.dtype}", key=f"{name}.datatype", value=shown(datatype))
    count = math.prod(shape)
    # Tuples of types: a union is made anew each time.
    if isinstance(data, (bytes, memoryview)):
        return _from_buffer(data, spec, shape, count)
    if not isinstance(data, (list, np.ndarray)):
        raise InvalidTensor("must be a list of the values", key=f"{name}.data", value=shown(data))
    array = _array(data, spec)
    if list(array.shape) != shape and (array.ndim != 1 or array.size != count):
        raise InvalidTensor(f"must have the shape {shape} or be its {count} values in a row", key=f"{name}.data", value=list(array.shape))
    return array.reshape(shape)


def _from_buffer(data: bytes | memoryview, spec: TensorSpec, shape: list[int], count: int) -> Array:
    dtype = NUMPY[spec.dtype]
    if len(data) != count * dtype.itemsize:
        raise InvalidTensor(f"must be {count * dtype.itemsize} bytes for {spec.dtype}{shape}", key=f"{spec.name}.data", value=f"{len(data)} bytes")
    array = np.frombuffer(data, dtype)
    if spec.dtype == "BOOL" and array.view(np.uint8).max(initial=0) > 1:
        raise InvalidTensor("must be bytes of 0 and 1", key=f"{spec.name}.data", value=int(array.view(np.uint8).max()))
    return array.reshape(shape)


def _narrowed(values: Array, spec: TensorSpec) -> Array:
    """Values of a wider type in the input's own; InvalidTensor where they are of another kind or one does not fit."""
    dtype = np.dtype(np.float32) if spec.dtype == "BF16" else NUMPY[spec.dtype]
    if values.dtype == dtype or not values.size:
        array = values.astype(dtype, copy=False)
    elif dtype.kind == "f" and values.dtype.kind in "iuf":
        with np.errstate(over="ignore"):
            array = values.astype(dtype)
        if not (finite := np.isfinite(array)).all():
            raise InvalidTensor(f"does not fit {spec.dtype}", key=spec.name, value=values[int(np.argmin(finite))].item())
    elif dtype.kind in "iu" and values.dtype.kind in "iu":
        limits = np.iinfo(dtype.name)
        for wrong in (values.min(), values.max()):
            if not limits.min <= wrong <= limits.max:
                raise InvalidTensor(f"does not fit {spec.dtype}", key=spec.name, value=int(wrong))
        array = values.astype(dtype)
    else:
        raise _wrong_kind(spec, values[0].item())
    return _to_bf16(array) if spec.dtype == "BF16" else array


def _wrong_kind(spec: TensorSpec, value: object) -> InvalidTensor:
    names = " and ".join(sorted(kind.__name__ for kind in _kinds(spec)))
    return InvalidTensor(f"takes only {names} values ({spec.dtype})", key=spec.name, value=shown(value))


def _kinds(spec: TensorSpec) -> frozenset[type]:
    """What JSON values of this input are."""
    return _BOOLEANS if spec.dtype == "BOOL" else _NUMBERS if spec.dtype in ("FP16", "FP32", "FP64", "BF16") else _INTEGERS


def _array(values: Any, spec: TensorSpec) -> Array:
    """Nested lists of JSON values as one tensor; every error names the input."""
    shape, flat = _flatten(values, spec.name)
    if isinstance(flat, np.ndarray):
        return _narrowed(flat, spec).reshape(shape)
    kinds = _kinds(spec)
    if not set(map(type, flat)) <= kinds:
        raise _wrong_kind(spec, next(value for value in flat if type(value) not in kinds))
    try:
        with np.errstate(over="ignore"):
            array: Array = np.array(flat, np.float32 if spec.dtype == "BF16" else NUMPY[spec.dtype])
    except OverflowError:
        bits = 8 * DTYPE_BYTES[spec.dtype]
        low, high = (0, 2**bits) if spec.dtype.startswith("U") else (-(2 ** (bits - 1)), 2 ** (bits - 1))
        wrong = next((value for value in flat if not low <= value < high), None)
        raise InvalidTensor(f"does not fit {spec.dtype}", key=spec.name, value=wrong) from None
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise InvalidTensor(f"does not fit {spec.dtype}", key=spec.name, value=flat[int(np.argmin(np.isfinite(array)))])
    return (_to_bf16(array) if spec.dtype == "BF16" else array).reshape(shape)


def _flatten(values: Any, name: str) -> tuple[list[int], list[Any] | Array]:
    """(shape, values in row-major order) of nested lists, the innermost of which may be arrays; InvalidTensor where they are ragged."""
    if isinstance(values, np.ndarray):
        return list(values.shape), values
    if not isinstance(values, list):
        return [], [values]
    shape = [len(values)]
    while values and type(values[0]) is list:
        if len(shape) == _MAX_DIMS:
            raise InvalidTensor(f"has more than {_MAX_DIMS} dimensions", key=name, value=shown(values[0]))
        length = len(values[0])
        if set(map(type, values)) != {list} or set(map(len, values)) != {length}:
            wrong = next(row for row in values if type(row) is not list or len(row) != length)
            raise InvalidTensor(f"is ragged: a row of {length} values is followed by another", key=name, value=shown(wrong))
        shape.append(length)
        values = list(chain.from_iterable(values))
    if values and isinstance(values[0], np.ndarray):
        length = len(values[0])
        if any(type(row) is not np.ndarray or len(row) != length for row in values):
            raise InvalidTensor(f"is ragged: a row of {length} numbers is followed by another", key=name, value=f"{len(values)} rows")
        return [*shape, length], np.concatenate(values)
    return shape, values


def readable(array: Array, dtype: str) -> Array:
    """An array that JSON can hold; BF16 becomes the FP32 of the same value."""
    return (array.astype(np.uint32) << 16).view(np.float32) if dtype == "BF16" else array


def as_bytes(array: Array) -> memoryview:
    """The elements of a C-contiguous array in row-major order, where they lie."""
    return memoryview(array.reshape(-1).view(np.uint8))  # type: ignore[arg-type]


def _to_bf16(values: Array) -> Array:
    """FP32 to the bits of BF16, to nearest, ties to even."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


class _Shown(str):
    """Text that stands in an error message as it is."""

    __slots__ = ()
    __repr__ = str.__str__


def shown(value: object) -> _Shown:
    """A value from outside, short enough for a message."""
    return _Shown(_short.repr(value))
