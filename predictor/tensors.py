"""Request bodies to numpy and numpy to answers: KServe's V1 `instances` and `predictions`, V2's named tensors as JSON.

Owns the two JSON dialects. Pure: no sockets, no shared memory, no kserve. A body that does not fit the model is an InvalidTensor that says which
tensor, which value, and what the model takes. Booleans, numbers and text are never taken for one another, and a number that its datatype cannot
hold is an error rather than infinity. JSON has no NaN: none can come in, and what is not finite goes out as null.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import orjson

from contracts.artifact import DTYPE_BYTES, Signature, TensorSpec
from contracts.errors import InvalidTensor, InvalidValue

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
_short = reprlib.Repr()
_short.maxlevel = 3
_JSON_OPTIONS = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS


class Asked(msgspec.Struct, frozen=True):
    """A V2 request as a model sees it: inputs by name, the id to hand back, and the outputs that are wanted (None: all)."""

    inputs: dict[str, Array]
    id: str | None = None
    outputs: tuple[str, ...] | None = None


def parse(body: bytes) -> Any:
    """The JSON value of a body; InvalidValue says where it breaks."""
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidValue(f"the body is no JSON: {error}") from None


def dump(value: object) -> bytes:
    """JSON of an answer, arrays included."""
    return orjson.dumps(value, option=_JSON_OPTIONS)


def decode_v1(document: object, signature: Signature) -> dict[str, Array]:
    """Inputs from `{"instances": [row, ...]}`: a row is an array, or an object of arrays by input name (always, when there are several inputs).

    For a model that takes no batches, `instances` holds exactly one row, and that row is the whole input.
    """
    if not isinstance(document, dict) or "instances" not in document:
        raise InvalidTensor('write {"instances": [...]}', key="body", value=_shown(document))
    rows = document["instances"]
    if not isinstance(rows, list) or not rows:
        raise InvalidTensor("must be a list of at least one row", key="instances", value=_shown(rows))
    if not signature.batchable and len(rows) != 1:
        raise InvalidTensor("this model takes one row a request", key="instances", value=f"{len(rows)} rows")
    return {name: _array(values if signature.batchable else values[0], spec) for name, (values, spec) in _columns(rows, signature).items()}


def _columns(rows: list[Any], signature: Signature) -> dict[str, tuple[list[Any], TensorSpec]]:
    """Rows to one list a input."""
    specs = {spec.name: spec for spec in signature.inputs}
    if not isinstance(rows[0], dict):
        if len(specs) != 1:
            raise InvalidTensor(f"a row must be an object with the inputs {', '.join(specs)}", key="instances", value=_shown(rows[0]))
        return {name: (rows, spec) for name, spec in specs.items()}
    for number, row in enumerate(rows):
        if not isinstance(row, dict) or row.keys() != specs.keys():
            raise InvalidTensor(f"must be an object with the inputs {', '.join(specs)}", key=f"instances[{number}]", value=_shown(row))
    return {name: ([row[name] for row in rows], spec) for name, spec in specs.items()}


def decode_v2(document: object, signature: Signature) -> Asked:
    """A V2 inference request: `inputs` of name, shape, datatype and data (flat in row-major order, or nested)."""
    if not isinstance(document, dict) or not isinstance(document.get("inputs"), list):
        raise InvalidTensor('write {"inputs": [{"name", "shape", "datatype", "data"}, ...]}', key="body", value=_shown(document))
    id_ = document.get("id")
    if id_ is not None and not isinstance(id_, str):
        raise InvalidValue("must be text", key="id", value=_shown(id_))
    inputs: dict[str, Array] = {}
    for number, tensor in enumerate(document["inputs"]):
        if not isinstance(tensor, dict) or not isinstance(tensor.get("name"), str):
            raise InvalidTensor("must be an object with a name", key=f"inputs[{number}]", value=_shown(tensor))
        add_input(inputs, signature, tensor["name"], tensor.get("shape"), tensor.get("datatype"), tensor.get("data"))
    return Asked(inputs, id_, requested(document.get("outputs"), signature))


def add_input(inputs: dict[str, Array], signature: Signature, name: str, shape: object, datatype: object, data: object) -> None:
    """Adds one V2 tensor to `inputs`. `data` is a list of values, or bytes: the elements in row-major order, little endian, used without a copy."""
    spec = next((spec for spec in signature.inputs if spec.name == name), None)
    if spec is None:
        raise InvalidTensor(
            f"is no input of this model (inputs: {', '.join(spec.name for spec in signature.inputs)})", key="inputs", value=_shown(name)
        )
    if name in inputs:
        raise InvalidTensor("comes twice", key="inputs", value=name)
    if not isinstance(shape, list) or len(shape) > _MAX_DIMS or not all(type(size) is int and size >= 0 for size in shape):
        raise InvalidTensor("must be a list of whole numbers", key=f"{name}.shape", value=_shown(shape))
    if datatype != spec.dtype:
        raise InvalidTensor(f"must be {spec.dtype}", key=f"{name}.datatype", value=_shown(datatype))
    count = math.prod(shape)
    if isinstance(data, bytes):
        dtype = NUMPY[spec.dtype]
        if len(data) != count * dtype.itemsize:
            raise InvalidTensor(f"must be {count * dtype.itemsize} bytes for {spec.dtype}{shape}", key=f"{name}.data", value=f"{len(data)} bytes")
        inputs[name] = np.frombuffer(data, dtype).reshape(shape)
        return
    if not isinstance(data, list):
        raise InvalidTensor("must be a list of the values", key=f"{name}.data", value=_shown(data))
    array = _array(data, spec)
    if list(array.shape) != shape and (array.ndim != 1 or array.size != count):
        raise InvalidTensor(f"must have the shape {shape} or be its {count} values in a row", key=f"{name}.data", value=list(array.shape))
    inputs[name] = array.reshape(shape)


def requested(outputs: object, signature: Signature) -> tuple[str, ...] | None:
    """The names of the outputs that a request asks for (V2 `outputs`), None for all."""
    if outputs is None:
        return None
    known = [spec.name for spec in signature.outputs]
    names = [output.get("name") if isinstance(output, dict) else None for output in outputs] if isinstance(outputs, list) else [None]
    for name in names:
        if name not in known:
            raise InvalidTensor(f"asks for no output of this model (outputs: {', '.join(known)})", key="outputs", value=_shown(name))
    return tuple(str(name) for name in names) or None


def _array(values: Any, spec: TensorSpec) -> Array:
    """Nested lists of JSON values as one tensor; every error names the input."""
    shape, flat = _flatten(values, spec.name)
    kinds = set(map(type, flat))
    allowed = {bool} if spec.dtype == "BOOL" else {int, float} if spec.dtype in ("FP16", "FP32", "FP64", "BF16") else {int}
    if not kinds <= allowed:
        wrong = next(value for value in flat if type(value) not in allowed)
        names = " and ".join(sorted(kind.__name__ for kind in allowed))
        raise InvalidTensor(f"takes only {names} values ({spec.dtype})", key=spec.name, value=_shown(wrong))
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


def _flatten(values: Any, name: str) -> tuple[list[int], list[Any]]:
    """(shape, values in row-major order) of nested lists; InvalidTensor where they are ragged."""
    if not isinstance(values, list):
        return [], [values]
    shape = [len(values)]
    while values and type(values[0]) is list:
        if len(shape) == _MAX_DIMS:
            raise InvalidTensor(f"has more than {_MAX_DIMS} dimensions", key=name, value=_shown(values[0]))
        length = len(values[0])
        if set(map(type, values)) != {list} or set(map(len, values)) != {length}:
            wrong = next(row for row in values if type(row) is not list or len(row) != length)
            raise InvalidTensor(f"is ragged: a row of {length} values is followed by another", key=name, value=_shown(wrong))
        shape.append(length)
        values = list(chain.from_iterable(values))
    return shape, values


def encode_v1(outputs: Mapping[str, Array], signature: Signature) -> dict[str, object]:
    """`{"predictions": [row, ...]}`: a row is an array, or an object by output name when there are several outputs."""
    readable = {spec.name: _readable(outputs[spec.name], spec.dtype) for spec in signature.outputs}
    readable = {name: array.reshape(1)[0] if array.ndim == 0 else array for name, array in readable.items()}
    if len(readable) == 1:
        (only,) = readable.values()
        return {"predictions": only if signature.batchable else [only]}
    if not signature.batchable:
        return {"predictions": [readable]}
    rows = next(iter(readable.values())).shape[0]
    return {"predictions": [{name: array[row] for name, array in readable.items()} for row in range(rows)]}


def encode_v2(
    model: str, id_: str | None, outputs: Mapping[str, Array], signature: Signature, wanted: Sequence[str] | None, parameters: Mapping[str, object]
) -> dict[str, object]:
    """A V2 inference response; the outputs that were asked for, in that order, data flat."""
    dtypes = {spec.name: spec.dtype for spec in signature.outputs}
    tensors = [
        {"name": name, "shape": outputs[name].shape, "datatype": dtypes[name], "data": _readable(outputs[name], dtypes[name]).reshape(-1)}
        for name in wanted or dtypes
    ]
    answer: dict[str, object] = {"model_name": model, "outputs": tensors, "parameters": parameters}
    return answer if id_ is None else {"id": id_, **answer}


def _readable(array: Array, dtype: str) -> Array:
    """An array that JSON can hold; BF16 becomes the FP32 of the same value."""
    return (array.astype(np.uint32) << 16).view(np.float32) if dtype == "BF16" else array


def _to_bf16(values: Array) -> Array:
    """FP32 to the bits of BF16, to nearest, ties to even."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


class _Shown(str):
    """Text that stands in an error message as it is."""

    __slots__ = ()
    __repr__ = str.__str__


def _shown(value: object) -> _Shown:
    """A value from outside, short enough for a message."""
    return _Shown(_short.repr(value))
