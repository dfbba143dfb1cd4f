"""Bodies that lie: lengths, sizes, shapes and names that do not fit, torn JSON, numbers that are too large. Every one is answered, none is a 500, and
afterwards the node holds what it held.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import struct
from collections.abc import Iterator
from typing import Any

import grpc
import ngh2
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kserve.protocol.grpc.grpc_predict_v2_pb2 import ModelInferRequest

from benchmarks.protocol_parts import rpc
from tests.protocol.node import PATIENCE_S, Node, until
from tests.protocol.outside.expected import IDENTITY, SEVERAL, TEXT

GROWTH_BYTES = 64 << 20
FUZZ = settings(max_examples=150, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
LENGTH = "Inference-Header-Content-Length"
INFER = "/v2/models/{}/infer"


class Held:
    """What the node's processes hold."""

    def __init__(self, served: Node) -> None:
        self._served = served
        self._predictor = served.predictor()
        self._pids, self._open, self._rss = self._now()

    def _now(self) -> tuple[set[int], int, int]:
        return set(self._served.processes()), self._predictor.num_fds(), self._predictor.memory_info().rss

    def more(self) -> str:
        """What there is more than before, in words."""
        pids, open_, rss = self._now()
        new = [self._served.processes().get(pid) for pid in pids - self._pids]  # the loader ends by itself when it is idle
        grown = f"{rss - self._rss} bytes of memory" if rss - self._rss > GROWTH_BYTES else ""
        found = (
            f"processes {new}" if new else "",
            f"{open_ - self._open} descriptors" if open_ > self._open else "",
            grown,
        )
        held = self._served.segment_bytes()
        return ", ".join(filter(None, (*found, f"{held:.0f} bytes of the segment" if held else "")))


def ask(served: Node, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, bytes]:
    """One request on a connection of its own; (status, body)."""
    connection = http.client.HTTPConnection(served.http, timeout=PATIENCE_S)
    try:
        connection.request("POST", path, body, {"Connection": "close", **headers})
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


@pytest.fixture(autouse=True, scope="module")
def _nothing_is_left_behind(served: Node) -> Iterator[None]:
    works(served)
    held = Held(served)
    yield
    until(lambda: not held.more(), lambda: f"the node holds {held.more()} more")
    works(served)


@pytest.fixture(scope="module")
def channel(served: Node) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(served.rpc) as channel:
        yield channel


def works(served: Node) -> None:
    """A good request is answered rightly."""
    body = {"inputs": [{"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1.5, 2.5]}]}
    status, answer = ask(served, INFER.format(IDENTITY), json.dumps(body).encode(), {})
    assert status == 200, answer
    assert json.loads(answer)["outputs"][0]["data"] == [1.5, 2.5]


def refused_or_answered(status: int, answer: bytes) -> None:
    """An answer, or an error that says why; never a failure of the server."""
    assert status in (200, 400, 404, 411, 413), (status, answer)
    assert status == 200 or json.loads(answer)["error"]


numbers = st.integers(-(2**70), 2**70) | st.sampled_from([0, 1, -1, 16, 2**31, 2**32, 2**53, 2**63, 2**64 - 1, 10**30]) | st.floats() | st.booleans()
odd = st.none() | numbers | st.text(max_size=8) | st.lists(numbers, max_size=4) | st.dictionaries(st.text(max_size=4), numbers, max_size=2)
names = st.sampled_from(["x", "left", "right", "text", "y", ""]) | st.text(max_size=8)
datatypes = st.sampled_from(["FP32", "INT64", "BYTES", "BF16", "BOOL", "fp32", "FP8", ""])
data = st.lists(numbers, max_size=6) | st.lists(st.lists(numbers, max_size=3), max_size=3) | st.lists(st.text(max_size=5), max_size=3) | odd
parameters = st.fixed_dictionaries({}, optional={"binary_data_size": numbers, "shared_memory_region": st.just("r"), "more": odd})
tensors = st.fixed_dictionaries(
    {},
    optional={
        "name": names | odd,
        "shape": st.lists(numbers, max_size=4) | odd,
        "datatype": datatypes | odd,
        "data": data,
        "parameters": parameters | odd,
    },
)
documents = st.fixed_dictionaries(
    {},
    optional={
        "id": st.text(max_size=4) | odd,
        "inputs": st.lists(tensors | odd, max_size=4) | odd,
        "outputs": st.lists(st.fixed_dictionaries({"name": st.sampled_from(["y", "sum"]) | odd}), max_size=3) | odd,
        "parameters": st.fixed_dictionaries({"binary_data_output": odd}) | odd,
        "instances": data,
    },
)
models = st.sampled_from([IDENTITY, SEVERAL, TEXT])


def torn(draw: st.DrawFn, body: bytes) -> bytes:
    """The body, cut somewhere or with some bytes replaced, or as it is."""
    if not body or draw(st.booleans()):
        return body
    at = draw(st.integers(0, len(body)))
    return body[:at] + (b"" if draw(st.booleans()) else draw(st.binary(max_size=4)) + body[at:])


@st.composite
def bodies(draw: st.DrawFn) -> bytes:
    """JSON documents, some of them torn."""
    return torn(draw, json.dumps(draw(documents)).encode())


@st.composite
def lies(draw: st.DrawFn) -> tuple[bytes, str]:
    """(body, header length) of a binary request whose parts need not fit one another."""
    payload = draw(st.binary(max_size=64))
    size = draw(st.just(len(payload)) | numbers)
    shape: Any = draw(st.sampled_from([[1, len(payload) // 4], [0, 4], [len(payload) // 4], [-1, 4], [2**40, 2**40]]) | st.lists(numbers, max_size=3))
    tensor = {"name": "x", "shape": shape, "datatype": draw(datatypes), "parameters": {"binary_data_size": size}}
    document = {"inputs": [tensor] * draw(st.sampled_from([1, 1, 1, 2, 0]))} if draw(st.booleans()) else draw(documents)
    head = torn(draw, json.dumps(document).encode())
    exact = str(len(head))
    length = draw(st.just(exact) | st.sampled_from(["", "-1", "0", "1e3", "+5", "٣", " 5", "99999999999999999999", "0x10"]) | numbers.map(str))
    return head + payload, length


@FUZZ
@given(body=bodies(), model=models, v1=st.booleans())
def test_json_that_lies(served: Node, body: bytes, model: str, v1: bool) -> None:
    path = f"/v1/models/{model}:predict" if v1 else INFER.format(model)
    refused_or_answered(*ask(served, path, body, {"Content-Type": "application/json"}))


@FUZZ
@given(lie=lies(), model=models)
def test_binary_requests_that_lie(served: Node, lie: tuple[bytes, str], model: str) -> None:
    body, length = lie
    refused_or_answered(*ask(served, INFER.format(model), body, {LENGTH: length.encode(), "Content-Type": "application/octet-stream"}))  # type: ignore[dict-item]


EXACT = {
    "a size larger than the body": ([("x", [1, 4], 64)], b"\0" * 16),
    "a size smaller than the tensor": ([("x", [1, 4], 8)], b"\0" * 16),
    "bytes that no tensor claims": ([("x", [1, 2], 8)], b"\0" * 16),
    "two tensors of one name": ([("x", [1, 2], 8), ("x", [1, 2], 8)], b"\0" * 16),
    "a shape beyond all memory": ([("x", [2**40, 2**40], 16)], b"\0" * 16),
    "a negative size": ([("x", [1, 4], -16)], b"\0" * 16),
    "a size that is true": ([("x", [1, 4], True)], b"\0" * 16),
}


@pytest.mark.parametrize(("claimed", "payload"), EXACT.values(), ids=EXACT.keys())
def test_sizes_that_do_not_add_up_are_refused(served: Node, claimed: list[tuple[str, list[int], int]], payload: bytes) -> None:
    inputs = [{"name": name, "shape": shape, "datatype": "FP32", "parameters": {"binary_data_size": size}} for name, shape, size in claimed]
    head = json.dumps({"inputs": inputs}).encode()
    status, answer = ask(served, INFER.format(IDENTITY), head + payload, {LENGTH: str(len(head))})
    assert status == 400, answer
    assert json.loads(answer)["error"]


@pytest.mark.parametrize("length", ["-1", "1e3", "99999999999999999999", "x", "0x10", "1_0"])
def test_header_lengths_that_lie_are_refused(served: Node, length: str) -> None:
    status, answer = ask(served, INFER.format(IDENTITY), b'{"inputs": []}', {LENGTH: length})
    assert status == 400, answer


@st.composite
def calls(draw: st.DrawFn) -> bytes:
    """A ModelInferRequest whose parts need not fit one another, some of them torn."""
    request = ModelInferRequest(model_name=draw(models), id=draw(st.text(max_size=4)), model_version=draw(st.sampled_from(["", "", "1", "2"])))
    for _ in range(draw(st.integers(0, 3))):
        sizes = st.integers(-(2**63), 2**63 - 1) | st.sampled_from([0, 1, 2, 4, -1, 2**40])
        tensor = request.inputs.add(
            name=draw(st.sampled_from(["x", "left", "text"])), datatype=draw(datatypes), shape=draw(st.lists(sizes, max_size=3))
        )
        tensor.contents.fp32_contents.extend(draw(st.lists(st.floats(width=32), max_size=4)))
        tensor.contents.bytes_contents.extend(draw(st.lists(st.binary(max_size=4), max_size=2)))
    request.raw_input_contents.extend(draw(st.lists(st.binary(max_size=32), max_size=3)))
    return torn(draw, request.SerializeToString())


@FUZZ
@given(message=calls())
def test_messages_that_lie(channel: grpc.Channel, message: bytes) -> None:
    call = channel.unary_unary(rpc.INFER).future(message, timeout=PATIENCE_S)
    assert call.code() in (grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND), call.details()


@st.composite
def conversations(draw: st.DrawFn) -> bytes:
    """What a client sends on a connection: calls that are whole, cut off or reset, and then a change somewhere in its frames."""
    client = ngh2.Connection(ngh2.Role.CLIENT)
    client.initiate_connection()
    for _ in range(draw(st.integers(0, 4))):
        path = draw(st.sampled_from([rpc.INFER, rpc.INFER, f"{rpc.SERVICE}/ServerLive", "/nothing"])).encode()
        fields = {b":method": b"POST", b":scheme": b"http", b":authority": b"x", b":path": path, b"content-type": b"application/grpc"}
        fields |= draw(st.sampled_from([{}, {b"grpc-timeout": b"1S"}, {b"grpc-timeout": b"x"}, {b"grpc-encoding": b"gzip"}]))
        stream = client.send_request(fields.items())
        message = draw(calls())
        prefix = struct.pack(">BI", draw(st.sampled_from([0, 0, 0, 1, 255])), draw(st.sampled_from([len(message), len(message), 0, 2**32 - 1])))
        client.send_data(stream, prefix + message, end_stream=draw(st.booleans()))
    return torn(draw, client.data_to_send())


@FUZZ
@given(sent=conversations())
def test_frames_that_lie(served: Node, sent: bytes) -> None:
    """The server lets go of the connection when the client has; what it holds afterwards is looked at when all are through."""
    host, _, port = served.rpc.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE_S) as sock, contextlib.suppress(ConnectionError):
        sock.sendall(sent)
        sock.shutdown(socket.SHUT_WR)
        while sock.recv(1 << 16):
            pass
