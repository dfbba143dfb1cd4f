"""Clients that send nonsense over HTTP: an error for them, right answers for everybody else, and the node holds no more than before."""

from __future__ import annotations

import contextlib
import json
import socket
import tempfile
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.faults.real import FEATURES, source, until
from tests.faults.whole import Load, Whole

MODELS = {"mine": source(1)}
GROWTH_BYTES = 300 << 20
ROW = [0.5] * FEATURES


class Scene:
    """A node and the well-behaved clients beside the hostile ones."""

    def __init__(self, node: Whole) -> None:
        self.node = node
        self.load = Load(node.url, MODELS, clients=2)
        parts = urllib.parse.urlsplit(node.url)
        self.address = (parts.hostname, parts.port)
        self.pids = {role: node.one(role).pid for role in ("agent", "predictor", "lane")}

    def connect(self) -> socket.socket:
        """A connection to the predictor."""
        return socket.create_connection(self.address, timeout=60)

    def undisturbed(self) -> None:
        """The others have been served since, by the same processes."""
        self.load.serves_all()
        assert {role: self.node.one(role).pid for role in self.pids} == self.pids

    def ask(self, body: bytes, path: str = "/v2/models/mine/infer", method: str = "POST", headers: str = "") -> tuple[int, bytes]:
        """One request as it stands; (status, body), or (0, b"") when the connection is closed without an answer."""
        head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n{headers}"
        with self.connect() as sock:
            return answer(sock, f"{head}Content-Length: {len(body)}\r\n\r\n".encode("latin-1") + body)


def answer(sock: socket.socket, data: bytes) -> tuple[int, bytes]:
    """Sends bytes and reads to the end of the stream."""
    received = b""
    with contextlib.suppress(ConnectionResetError, BrokenPipeError):
        sock.sendall(data)
    with contextlib.suppress(ConnectionResetError):
        while chunk := sock.recv(1 << 16):
            received += chunk
    head, _, body = received.partition(b"\r\n\r\n")
    return int(head.split(b" ")[1]) if head else 0, body


@pytest.fixture(scope="module")
def scene() -> Iterator[Scene]:
    with tempfile.TemporaryDirectory(prefix="sluice-hostile-", dir="/tmp") as folder:
        node = Whole(Path(folder), MODELS)
        try:
            warm = Load(node.url, MODELS, clients=2)
            warm.serves_all()
            warm.stop()
            node.settle()
            predictor = psutil.Process(node.one("predictor").pid)
            held = predictor.memory_info().rss
            scene = Scene(node)
            yield scene
            scene.undisturbed()
            assert set(scene.load.stop()) == {"200"}
            node.leaks_nothing()
            assert predictor.memory_info().rss - held < GROWTH_BYTES
        finally:
            node.kill()


def tensor(**changes: Any) -> dict[str, Any]:
    return {"name": "features", "shape": [1, FEATURES], "datatype": "FP32", "data": ROW, **changes}


def v2(*tensors: Any, **fields: Any) -> bytes:
    return json.dumps({"inputs": list(tensors), **fields}).encode()


BODIES: dict[str, bytes] = {
    "nothing": b"",
    "no JSON": b"hello",
    "half of it": v2(tensor())[:-20],
    "JSON with a tail": v2(tensor()) + b"}",
    "no UTF-8": b'{"inputs": "\xff\xfe"}',
    "a NUL": b"\0",
    "null": b"null",
    "a number": b"1e999",
    "a list": b"[]",
    "deep nesting": b"[" * 200_000,
    "deep nesting that ends": b'{"inputs":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep data": v2(tensor()).replace(json.dumps(ROW).encode(), b"[" * 5000 + b"1" + b"]" * 5000),
    "no inputs": b"{}",
    "inputs that are no list": b'{"inputs": {"features": 1}}',
    "inputs of null": b'{"inputs": [null]}',
    "an empty list of inputs": v2(),
    "an input twice": v2(tensor(), tensor()),
    "ten thousand inputs": v2(*[tensor(data=[])] * 10_000),
    "an input of another name": v2(tensor(name="../features")),
    "an input without a name": v2({"shape": [1, FEATURES], "datatype": "FP32", "data": ROW}),
    "a name that is no text": v2(tensor(name=[1])),
    "another datatype": v2(tensor(datatype="INT32")),
    "a datatype that there is not": v2(tensor(datatype="FP33")),
    "a datatype of bytes": v2(tensor(datatype="BYTES", data=["x"] * FEATURES)),
    "another rank": v2(tensor(shape=[FEATURES])),
    "another width": v2(tensor(shape=[1, FEATURES + 1])),
    "no rows": v2(tensor(shape=[0, FEATURES], data=[])),
    "negative rows": v2(tensor(shape=[-1, FEATURES])),
    "rows beyond 64 bits": v2(tensor(shape=[2**70, FEATURES])),
    "a shape whose product overflows": v2(tensor(shape=[2**62, 16])),
    "a shape of fractions": v2(tensor(shape=[1.5, FEATURES])),
    "a shape of booleans": v2(tensor(shape=[True, FEATURES])),
    "a shape of text": v2(tensor(shape="16")),
    "more rows than the function takes": v2(tensor(shape=[1000, FEATURES], data=ROW * 1000)),
    "too little data": v2(tensor(data=ROW[1:])),
    "too much data": v2(tensor(data=[*ROW, 1.0])),
    "no data": v2({"name": "features", "shape": [1, FEATURES], "datatype": "FP32"}),
    "data of text": v2(tensor(data=["a"] * FEATURES)),
    "data of null": v2(tensor(data=[None] * FEATURES)),
    "data of objects": v2(tensor(data=[{}] * FEATURES)),
    "ragged data": v2(tensor(data=[[0.5] * 8, [0.5] * 7])),
    "an output that there is not": v2(tensor(), outputs=[{"name": "../scores"}]),
    "outputs that are no list": v2(tensor(), outputs=7),
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_a_bad_body_is_a_bad_request(body: bytes, scene: Scene) -> None:
    status, answered = scene.ask(body)
    assert status == 400, answered
    assert json.loads(answered)["error"]
    assert len(answered) < 6000
    scene.undisturbed()


@pytest.mark.parametrize(
    "body",
    [b"", b"null", b"{}", b'{"instances": 1}', b'{"instances": []}', b'{"instances": [[[]]]}', b'{"instances": ["x"]}', b"[" * 100_000],
    ids=["nothing", "null", "no instances", "a number", "no rows", "another rank", "text", "deep nesting"],
)
def test_a_bad_body_of_v1_is_a_bad_request(body: bytes, scene: Scene) -> None:
    status, answered = scene.ask(body, "/v1/models/mine:predict")
    assert status == 400, answered
    assert json.loads(answered)["error"]
    scene.undisturbed()


PATHS = [
    "/v2/models/nobody/infer",
    "/v2/models/../infer",
    "/v2/models/..%2f..%2fetc%2fpasswd/infer",
    "/v2/models/%2e%2e/%2e%2e/etc/passwd",
    "/v2/models/default%2fmine/infer",
    "/v2/models/mine%00/infer",
    "/v2/models/mine@1/infer",
    "/v2/models/mine/../mine/infer",
    "/v2/models//infer",
    "/v2/models/" + "x" * 20_000 + "/infer",
    "/v1/models/:predict",
    "/v1/models/../../mine:predict",
    "/v1/models/%F0%28%8C%28:predict",
    "/../../etc/passwd",
    "//etc/passwd",
    "/v2/models/mine/versions/../../../etc/passwd/infer",
    "/v2/repository/models/..%2f/load",
    "/v2/repository/models/mine%2f../unload",
]


@pytest.mark.parametrize("method", ["POST", "GET"])
@pytest.mark.parametrize("path", PATHS, ids=lambda path: path[:40])
def test_a_tricky_path_finds_nothing(path: str, method: str, scene: Scene) -> None:
    status, answered = scene.ask(v2(tensor()), path, method)
    assert 400 <= status <= 501, answered
    assert b"root:" not in answered
    scene.undisturbed()


HEADERS = {
    "a timeout of nothing": ("Sluice-Timeout-Ms: 0\r\n", {400}),
    "a timeout of text": ("Sluice-Timeout-Ms: soon\r\n", {400}),
    "a timeout of no number": ("Sluice-Timeout-Ms: nan\r\n", {400}),
    "a timeout of for ever": ("Sluice-Timeout-Ms: inf\r\n", {400}),
    "a negative timeout": ("Sluice-Timeout-Ms: -5\r\n", {400}),
    "a binary body that is none": ("Inference-Header-Content-Length: 5\r\n", {200, 400}),
    "a binary header longer than the body": ("Inference-Header-Content-Length: 100000\r\n", {200, 400}),
    "a binary header of negative length": ("Inference-Header-Content-Length: -1\r\n", {200, 400}),
    "a binary header of text": ("Inference-Header-Content-Length: x\r\n", {200, 400}),
    "a CloudEvent that is none": ("ce-specversion: 1.0\r\n", {200, 400}),
    "an unknown encoding": ("Content-Encoding: gzip\r\n", {200, 400, 415}),
    "a hundred headers": ("".join(f"x-{number}: {'y' * 100}\r\n" for number in range(100)), {200, 400, 431}),
    "a header of a megabyte": (f"x: {'y' * 1_000_000}\r\n", {0, 400}),
}


@pytest.mark.parametrize(("headers", "statuses"), HEADERS.values(), ids=HEADERS)
def test_odd_headers(headers: str, statuses: set[int], scene: Scene) -> None:
    status, answered = scene.ask(v2(tensor()), headers=headers)
    assert status in statuses, answered
    scene.undisturbed()


@pytest.mark.parametrize("line", [b"x: " + b"y" * (1 << 20) + b"\r\n", b"y" * (1 << 20)], ids=["many headers", "one header"])
def test_a_head_without_end_is_cut_off(line: bytes, scene: Scene) -> None:
    with scene.connect() as sock:
        sock.sendall(b"POST /v2/models/mine/infer HTTP/1.1\r\nHost: x\r\nx: ")
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            _send_many(sock, line)
    scene.undisturbed()


def _send_many(sock: socket.socket, line: bytes) -> None:
    for _ in range(200):
        sock.sendall(line)


def test_a_huge_body_is_refused_before_it_is_read(scene: Scene) -> None:
    with scene.connect() as sock:
        sock.sendall(b"POST /v2/models/mine/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000000\r\n\r\n")
        status, _ = answer(sock, b" " * (80 << 20))
    assert status in (0, 413)
    scene.undisturbed()


def test_a_huge_chunked_body_is_refused_too(scene: Scene) -> None:
    with scene.connect() as sock:
        sock.sendall(b"POST /v2/models/mine/infer HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        status, _ = answer(sock, (b"100000\r\n" + b" " * (1 << 20) + b"\r\n") * 80)
    assert status in (0, 413)
    scene.undisturbed()


@pytest.mark.parametrize(
    "data",
    [
        b"\0" * 100 + b"\r\n\r\n",
        b"POST\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x16\x03\x01\x02\x00" * 20 + b"\r\n\r\n",
    ],
    ids=["NULs", "half a line", "a version that there is not", "HTTP/2", "TLS"],
)
def test_what_is_no_http_is_refused(data: bytes, scene: Scene) -> None:
    with scene.connect() as sock:
        status, _ = answer(sock, data)
    assert status in (0, 400, 404, 505)
    scene.undisturbed()


def test_clients_that_leave_at_every_byte(scene: Scene) -> None:
    body = v2(tensor())
    request = b"POST /v2/models/mine/infer HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    for end in range(1, len(request) + 1, 3):
        with scene.connect() as sock:
            sock.sendall(request[:end])
    for _ in range(100):
        with scene.connect() as sock:
            sock.sendall(request)
    scene.undisturbed()


def test_two_hundred_slow_clients_keep_nobody_waiting(scene: Scene) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(200):
            sock = stack.enter_context(scene.connect())
            sock.sendall(b'POST /v2/models/mine/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n{"inputs": [')
        scene.undisturbed()


def test_a_client_that_never_reads_its_answers(scene: Scene) -> None:
    body = v2(tensor())
    request = b"POST /v2/models/mine/infer HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    with scene.connect() as sock:
        sock.setblocking(False)
        with contextlib.suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):
            for _ in range(2000):
                sock.sendall(request)
        scene.undisturbed()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["FP32", "features", "scores", FEATURES]),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["name", "shape", "datatype", "data", "inputs", "id"]), inner, max_size=5)
    ),
    max_leaves=20,
)
TENSOR = st.fixed_dictionaries(
    {},
    optional={
        "name": st.just("features") | JSON,
        "shape": st.just([1, FEATURES]) | JSON,
        "datatype": st.just("FP32") | JSON,
        "data": st.just(ROW) | JSON,
        "parameters": JSON,
    },
)
DOCUMENTS = JSON | st.fixed_dictionaries({"inputs": st.lists(TENSOR, max_size=2)}, optional={"id": JSON, "outputs": JSON, "parameters": JSON})


@settings(max_examples=200)
@given(DOCUMENTS)
def test_any_document_is_answered_or_a_bad_request(scene: Scene, document: Any) -> None:
    status, answered = scene.ask(json.dumps(document).encode())
    assert status in (200, 400), answered
    assert "error" in json.loads(answered) or status == 200


def test_after_all_that_nothing_is_left_in_the_predictors_memory(scene: Scene) -> None:
    """Each request that was refused or left gave its room back."""
    scene.undisturbed()

    def used() -> float:
        _, body = scene.ask(b"", "/metrics", "GET")
        return sum(float(line.split()[-1]) for line in body.decode().splitlines() if line.startswith("sluice_segment_used_bytes"))

    until(lambda: used() <= 2 * 4096, lambda: f"{used()} bytes of the segment are taken")
