"""HTTP requests as the bytes that go over the wire, one maker for each protocol, and what an answer's bytes hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import orjson
from numpy.typing import NDArray

Values = NDArray[np.float32]
IDENTITY = "identity"
INPUT, OUTPUT = "x", "y"
HTTP = ("v1", "v2", "binary")
KINDS = (*HTTP, "grpc")
ID = "1"  # KServe's server fails without one
HEADER_LENGTH = "Inference-Header-Content-Length"


def _v1(_name: str, values: Values) -> tuple[bytes, dict[str, str]]:
    return orjson.dumps({"instances": values}, option=orjson.OPT_SERIALIZE_NUMPY), {}


def _v2(_name: str, values: Values) -> tuple[bytes, dict[str, str]]:
    tensor = {"name": INPUT, "shape": values.shape, "datatype": "FP32", "data": values.ravel()}
    return orjson.dumps({"id": ID, "inputs": [tensor]}, option=orjson.OPT_SERIALIZE_NUMPY), {}


def _binary(_name: str, values: Values) -> tuple[bytes, dict[str, str]]:
    tensor = {"name": INPUT, "shape": values.shape, "datatype": "FP32", "parameters": {"binary_data_size": values.nbytes}}
    header = orjson.dumps({"id": ID, "inputs": [tensor], "parameters": {"binary_data_output": True}})
    return header + values.tobytes(), {HEADER_LENGTH: str(len(header)), "Content-Type": "application/octet-stream"}


_BODIES: Mapping[str, Callable[[str, Values], tuple[bytes, dict[str, str]]]] = {"v1": _v1, "v2": _v2, "binary": _binary}


def path(kind: str, name: str) -> str:
    """Where a request of this kind is sent."""
    return f"/v1/models/{name}:predict" if kind == "v1" else f"/v2/models/{name}/infer"


def http_body(kind: str, name: str, values: Values) -> tuple[bytes, dict[str, str]]:
    """(body, headers) of an HTTP request with one FP32 input."""
    body, headers = _BODIES[kind](name, values)
    return body, {"Content-Type": "application/json", **headers}


def http_request(kind: str, name: str, values: Values) -> bytes:
    """A whole HTTP/1.1 request."""
    body, headers = http_body(kind, name, values)
    lines = "".join(f"{key}: {value}\r\n" for key, value in headers.items())
    return f"POST {path(kind, name)} HTTP/1.1\r\nHost: localhost\r\n{lines}Content-Length: {len(body)}\r\n\r\n".encode() + body


def http_answer(kind: str, headers: Mapping[str, str], body: bytes) -> Values:
    """The one output of a successful answer; `headers` in lower case. ValueError, KeyError or IndexError when there is none."""
    if kind == "v1":
        return np.array(orjson.loads(body)["predictions"], np.float32)
    length = int(headers.get(HEADER_LENGTH.lower(), len(body)))
    output = orjson.loads(body[:length])["outputs"][0]
    data = np.frombuffer(body[length:], np.float32) if "data" not in output else np.array(output["data"], np.float32)
    return data.reshape(output["shape"])
