"""Clients that take too much or too long, against a real server: they are told and sent away, and everybody else is served."""

from __future__ import annotations

import contextlib
import json
import resource
import select
import socket
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from kserve.protocol.grpc import grpc_predict_v2_pb2 as pb
from kserve.protocol.grpc.grpc_predict_v2_pb2_grpc import GRPCInferenceServiceStub

from predictor.protocols.limits import Limits
from tests.predictor.fake_agent import PAIR, FakeAgent, info
from tests.predictor.front_process import Front

MAX_BODY = 2 << 20
MAX_CONNECTIONS = 12
HEAD = b"POST /v1/models/double:predict HTTP/1.1\r\nHost: x\r\n"
BODY = b'{"instances": [[1, 2, 3, 4]]}'


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeAgent]:
    agent = FakeAgent(Path(tmp_path_factory.mktemp("run")) / "agent.sock", info("double"))
    agent.start()
    yield agent
    agent.release()
    agent.kill()


@pytest.fixture(scope="module")
def shared_front(agent: FakeAgent) -> Iterator[Front]:
    limits = ("--max-body-bytes", str(MAX_BODY), "--max-connections", str(MAX_CONNECTIONS), "--patience-s", "1", "--keep-alive-s", "2")
    front = Front(agent.path, "--grpc-port", "0", *limits).ready("double")
    yield front
    assert front.stop() == 0, front.log


@pytest.fixture
def front(shared_front: Front, agent: FakeAgent) -> Iterator[Front]:
    """The shared front; afterwards it serves as before, and holds nothing."""
    yield shared_front
    agent.release()
    shared_front.until(lambda: shared_front.predict("double", [1, 2, 3, 4]).status_code == 200)
    assert shared_front.metric("sluice_segment_used_bytes") == 0


@contextlib.contextmanager
def connection(front: Front, sent: bytes = b"", receive_bytes: int = 0) -> Iterator[socket.socket]:
    """`receive_bytes` bounds what the kernel takes of an answer that nobody reads; by itself it would take tens of MB."""
    parts = urllib.parse.urlsplit(front.url)
    assert parts.hostname
    assert parts.port
    with socket.socket() as sock:
        sock.settimeout(60)
        if receive_bytes:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        sock.connect((parts.hostname, parts.port))
        with contextlib.suppress(ConnectionError):
            sock.sendall(sent)
        yield sock


def answer(sock: socket.socket) -> tuple[int, bytes]:
    """(status, body) of what comes until the other end closes; (0, b"") when that is nothing."""
    received = b""
    with contextlib.suppress(ConnectionError):
        while chunk := sock.recv(1 << 16):
            received += chunk
    head, _, body = received.partition(b"\r\n\r\n")
    return int(head.split()[1]) if head else 0, body


def drip(sock: socket.socket, piece: bytes, pause_s: float = 0.05) -> tuple[int, bytes]:
    """Sends a piece again and again until the other end has had enough; its answer."""
    with contextlib.suppress(ConnectionError):
        while not select.select([sock], [], [], pause_s)[0]:
            sock.sendall(piece)
    return answer(sock)


def test_who_says_nothing_is_sent_away(front: Front) -> None:
    with connection(front) as sock:
        assert answer(sock)[0] == 408


DRIPS = {
    "a head that never ends, byte by byte": (HEAD + b"X: ", b"a", 408),
    "a body byte by byte": (HEAD + b"Content-Length: 60000\r\n\r\n{", b" ", 408),
    "a chunked body byte by byte": (HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n", 408),
    "trailers byte by byte": (HEAD + b"Transfer-Encoding: chunked\r\n\r\n0\r\n", b"a", 408),
    "the second request of a connection": (
        HEAD + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY + HEAD + b"X: ",
        b"a",
        200,
    ),
}


@pytest.mark.parametrize(("start", "piece", "status"), DRIPS.values(), ids=DRIPS)
def test_who_keeps_a_request_waiting_is_sent_away(front: Front, start: bytes, piece: bytes, status: int) -> None:
    with connection(front, start) as sock:
        found, body = drip(sock, piece) if status == 408 else (answer(sock))
    assert found == status, body
    assert b"408 Request Timeout" in body or status == 408


FLOODS = {
    "headers": (HEAD, b"X: " + b"a" * 8000 + b"\r\n"),
    "one header": (HEAD + b"X: ", b"a" * 8000),
    "trailers": (HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\n \r\n0\r\n", b"X: " + b"a" * 8000 + b"\r\n"),
    "one trailer": (HEAD + b"Transfer-Encoding: chunked\r\n\r\n0\r\nX: ", b"a" * 8000),
    "a chunk's extension": (HEAD + b"Transfer-Encoding: chunked\r\n\r\n1;x=", b"a" * 8000),
}


@pytest.mark.parametrize(("start", "piece"), FLOODS.values(), ids=FLOODS)
def test_what_never_ends_is_ended(front: Front, start: bytes, piece: bytes) -> None:
    with connection(front, start) as sock:
        status, body = drip(sock, piece, pause_s=0)
    assert status in (400, 0), body  # 0: more was on its way when the connection was closed, and the answer was lost with it


@pytest.mark.parametrize("length", [b"Content-Length: 99999999\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n"], ids=["announced", "in chunks"])
@pytest.mark.parametrize("path", [b"/v1/models/double:predict", b"/v2/models/double/infer", b"/v2/repository/index"])
def test_a_body_that_is_too_large_is_refused(front: Front, path: bytes, length: bytes) -> None:
    chunked = b"chunked" in length
    piece = b" " * (256 << 10)
    with connection(front, b"POST " + path + b" HTTP/1.1\r\nHost: x\r\n" + length) as sock:
        status, body = drip(sock, b"%x\r\n%s\r\n" % (len(piece), piece) if chunked else piece, pause_s=0)
    assert status in (413, 0), body


def test_an_answer_that_nobody_reads_is_thrown_away(tmp_path: Path) -> None:
    """12 MB do not fit what the two kernels hold for this connection. It is reset, which the client sees without reading."""
    own = FakeAgent(tmp_path / "agent.sock", info("pair", PAIR))
    own.start()
    front = Front(own.path, "--patience-s", "1", "--segment-bytes", "64Mi").ready("pair")
    count = 1_000_000
    tensors = [("a", "FP32", np.full(count, 0.123456, np.float32)), ("b", "INT64", np.zeros(count, np.int64))]
    inputs = [{"name": name, "datatype": kind, "shape": [1, count], "parameters": {"binary_data_size": data.nbytes}} for name, kind, data in tensors]
    document = json.dumps({"inputs": inputs}).encode()
    body = document + b"".join(data.tobytes() for _, _, data in tensors)
    head = b"POST /v2/models/pair/infer HTTP/1.1\r\nHost: x\r\nInference-Header-Content-Length: %d\r\nContent-Length: %d\r\n\r\n"
    with connection(front, head % (len(document), len(body)) + body, receive_bytes=1 << 16) as sock:
        poll = select.poll()
        poll.register(sock, 0)
        assert poll.poll(120_000), "still connected"
    assert front.stop() == 0, front.log
    own.kill()


def test_a_client_that_never_waits_for_an_answer_is_sent_away(front: Front) -> None:
    with connection(front) as sock:
        drip(sock, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 1000, pause_s=0)
    with connection(front, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 50) as sock:
        _, body = answer(sock)
    assert body.count(b'"alive"') == 50


def test_an_idle_connection_is_closed(front: Front) -> None:
    with connection(front, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n") as sock:
        status, body = answer(sock)
    assert (status, json.loads(body)) == (200, {"status": "alive"})


def test_one_connection_too_many_is_refused(front: Front) -> None:
    start = HEAD + b"Content-Length: 100\r\n\r\n"
    with contextlib.ExitStack() as stack:
        for _ in range(MAX_CONNECTIONS):
            stack.enter_context(connection(front, start))
        with connection(front, start) as sock:
            status, body = answer(sock)
    assert (status, json.loads(body)) == (503, {"error": "too many connections"})


def test_many_unfinished_bodies_are_refused_together(front: Front) -> None:
    """Each is within its own limit; together they are not."""
    start = HEAD + b"Content-Length: %d\r\n\r\n" % MAX_BODY + b" " * (MAX_BODY - 1)
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(connection(front, start)) for _ in range(6)]
        refused, _, _ = select.select(socks, [], [], 60)
        assert [answer(sock)[0] for sock in refused] == [503] * len(refused)
        assert 1 <= len(refused) < 6


@pytest.fixture(scope="module")
def stub(shared_front: Front) -> Iterator[GRPCInferenceServiceStub]:
    with grpc.insecure_channel(shared_front.grpc_address) as channel:
        yield GRPCInferenceServiceStub(channel)


def infer_request(rows: int = 1) -> pb.ModelInferRequest:
    request = pb.ModelInferRequest(model_name="double", raw_input_contents=[b"\0" * 16 * rows])
    request.inputs.add(name="x", datatype="FP32", shape=[rows, 4])
    return request


def test_a_grpc_message_that_is_too_large_is_refused(front: Front, stub: GRPCInferenceServiceStub) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        stub.ModelInfer(infer_request(rows=MAX_BODY // 16 + 1))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    stub.ModelInfer(infer_request())


def test_one_grpc_connection_too_many_is_refused(front: Front) -> None:
    host, _, port = front.grpc_address.rpartition(":")
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
    with contextlib.ExitStack() as stack:
        for _ in range(MAX_CONNECTIONS + 1):
            sock = stack.enter_context(socket.create_connection((host, int(port)), timeout=60))
            try:
                sock.sendall(preface)
                if not sock.recv(1):
                    break
            except ConnectionError:
                break
        else:
            pytest.fail("all were accepted")


def test_no_more_connections_are_promised_than_there_are_descriptors() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    fitting = Limits(max_connections=1 << 40).fitting()
    try:
        assert 1 <= fitting.max_connections < resource.getrlimit(resource.RLIMIT_NOFILE)[0] / 2
        assert fitting.fitting() == fitting
        assert Limits(max_connections=10).fitting().max_connections == 10
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_one_grpc_call_too_many_is_refused(front: Front, stub: GRPCInferenceServiceStub, agent: FakeAgent) -> None:
    agent.hold()
    calls = [stub.ModelInfer.future(infer_request(), timeout=60) for _ in range(MAX_CONNECTIONS)]
    front.until(lambda: front.metric("sluice_in_flight_requests", function="default/double") == MAX_CONNECTIONS)
    with grpc.insecure_channel(
        f"127.0.0.1:{front.log.split('serving gRPC on 127.0.0.1:')[1].split()[0]}", [("grpc.use_local_subchannel_pool", 1)]
    ) as other:
        with pytest.raises(grpc.RpcError) as caught:
            GRPCInferenceServiceStub(other).ModelInfer(infer_request(), timeout=60)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    agent.release()
    assert all(len(call.result().raw_output_contents) == 1 for call in calls)
