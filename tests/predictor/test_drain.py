"""The way down: readiness turns false first, connections are wound up, what was accepted is answered, over HTTP and gRPC, and nothing is reset."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import httpx
import psutil
import pytest
from kserve.protocol.grpc import grpc_predict_v2_pb2 as pb
from kserve.protocol.grpc.grpc_predict_v2_pb2_grpc import GRPCInferenceServiceStub

from tests.predictor.fake_agent import FakeAgent, info
from tests.predictor.front_process import Front

ROW = [1, 2, 3, 4]
BODY = json.dumps({"instances": [ROW]})
ANSWER = {"predictions": [[2, 4, 6, 8]]}


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[FakeAgent]:
    agent = FakeAgent(tmp_path / "agent.sock", info("double"))
    agent.start()
    yield agent
    agent.release()
    agent.kill()


@pytest.fixture
def start(agent: FakeAgent) -> Iterator[Callable[..., Front]]:
    started: list[Front] = []

    def start(*arguments: str) -> Front:
        started.append(Front(agent.path, *arguments).ready("double"))
        return started[-1]

    yield start
    for front in started:
        if front.process.poll() is None:
            front.stop()


def infer_request() -> pb.ModelInferRequest:
    request = pb.ModelInferRequest(model_name="double", raw_input_contents=[b"\0" * 16])
    request.inputs.add(name="x", datatype="FP32", shape=[1, 4])
    return request


def test_while_it_lingers_it_serves_but_is_not_ready_and_winds_up_connections(start: Callable[..., Front]) -> None:
    """Until a second signal."""
    front = start("--grpc-port", "0", "--linger-ms", "120000")
    address = urllib.parse.urlsplit(front.url)
    kept = http.client.HTTPConnection(str(address.hostname), address.port, timeout=60)
    kept.request("POST", "/v1/models/double:predict", BODY)
    before = kept.getresponse()
    assert (json.loads(before.read()), before.getheader("connection")) == (ANSWER, None)
    with grpc.insecure_channel(front.grpc_address) as channel:
        stub = GRPCInferenceServiceStub(channel)
        assert stub.ServerReady(pb.ServerReadyRequest()).ready
        front.process.terminate()
        front.until(lambda: not stub.ServerReady(pb.ServerReadyRequest(), timeout=60).ready)
        assert not stub.ModelReady(pb.ModelReadyRequest(name="double"), timeout=60).ready
        kept.request("POST", "/v1/models/double:predict", BODY)
        after = kept.getresponse()
        assert (json.loads(after.read()), after.getheader("connection")) == (ANSWER, "close")
        new = httpx.get(f"{front.url}/v2/health/ready", timeout=60)
        assert (new.status_code, new.headers["connection"]) == (503, "close")
        assert "shutting down" in httpx.get(f"{front.url}/v2/models/double/ready", timeout=60).text
        assert httpx.get(f"{front.url}/v2/health/live", timeout=60).status_code == 200
        assert len(stub.ModelInfer(infer_request(), timeout=60).raw_output_contents) == 1
        assert front.process.poll() is None
    front.process.terminate()
    assert front.wait() == 0, front.log


def test_grpc_calls_in_flight_are_answered(start: Callable[..., Front], agent: FakeAgent) -> None:
    front = start("--grpc-port", "0")
    agent.hold()
    with grpc.insecure_channel(front.grpc_address) as channel:
        calls = [GRPCInferenceServiceStub(channel).ModelInfer.future(infer_request(), timeout=60) for _ in range(10)]
        front.until(lambda: front.metric("sluice_in_flight_requests", function="default/double") == 10)
        front.process.terminate()
        front.until(lambda: "stopping" in front.log)
        agent.release()
        assert all(len(call.result().raw_output_contents) == 1 for call in calls)
    assert front.wait() == 0, front.log


def test_an_answer_to_a_request_that_was_in_flight_closes_its_connection(start: Callable[..., Front], agent: FakeAgent) -> None:
    front = start()
    agent.hold()
    answers: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: answers.append(httpx.post(f"{front.url}/v1/models/double:predict", content=BODY, timeout=60)))
    thread.start()
    front.until(lambda: front.metric("sluice_in_flight_requests", function="default/double") == 1)
    front.process.terminate()
    front.until(lambda: "stopping" in front.log)
    agent.release()
    thread.join()
    assert (answers[0].json(), answers[0].headers["connection"]) == (ANSWER, "close")
    assert front.wait() == 0, front.log


class Clients:
    """Threads that make a new connection for each request until they are refused. `lost` are those that connected and got no answer."""

    def __init__(self, front: Front, count: int) -> None:
        parts = urllib.parse.urlsplit(front.url)
        self._address = (str(parts.hostname), int(parts.port or 0))
        self.answered = 0
        self.lost: list[BaseException] = []
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._ask, daemon=True) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def _ask(self) -> None:
        request = f"POST /v1/models/double:predict HTTP/1.1\r\nHost: x\r\nContent-Length: {len(BODY)}\r\nConnection: close\r\n\r\n{BODY}".encode()
        while True:
            try:
                sock = socket.create_connection(self._address, timeout=60)
            except ConnectionRefusedError:
                return
            with contextlib.closing(sock):
                received = b""
                try:
                    sock.sendall(request)
                    while chunk := sock.recv(1 << 16):
                        received += chunk
                    assert received.startswith(b"HTTP/1.1 200") and json.loads(received.partition(b"\r\n\r\n")[2]) == ANSWER, received
                except (OSError, AssertionError, ValueError) as error:
                    self.lost.append(error)
                    return
                with self._lock:
                    self.answered += 1

    def join(self) -> None:
        for thread in self._threads:
            thread.join(120)
            assert not thread.is_alive()


def test_under_load_each_connection_is_answered_or_refused(start: Callable[..., Front]) -> None:
    front = start()
    clients = Clients(front, 8)
    front.until(lambda: clients.answered > 100 or bool(clients.lost))
    assert front.stop() == 0, front.log
    clients.join()
    assert clients.lost == []


def test_who_never_finishes_does_not_hold_it_up(start: Callable[..., Front]) -> None:
    front = start("--patience-s", "1")
    parts = urllib.parse.urlsplit(front.url)
    with socket.create_connection((str(parts.hostname), int(parts.port or 0))) as sock:
        sock.sendall(b"POST /v1/models/double:predict HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        front.until(lambda: front.http.get("/").status_code == 200)
        assert front.stop() == 0, front.log


def test_who_waits_for_a_model_does_not_hold_it_up(start: Callable[..., Front], agent: FakeAgent) -> None:
    front = start("--linger-ms", "120000")
    agent.tell(info("late", state="loading"))
    front.until(lambda: front.http.get("/v2/models/late/ready").status_code == 503)
    answers: list[httpx.Response] = []
    load = f"{front.url}/v2/repository/models/late/load"
    thread = threading.Thread(target=lambda: answers.append(httpx.post(load, headers={"Sluice-Timeout-Ms": "1000000"}, timeout=60)))
    process = psutil.Process(front.process.pid)
    before = process.num_fds()
    thread.start()
    front.until(lambda: process.num_fds() > before)
    front.process.terminate()
    thread.join()
    assert (answers[0].status_code, "is loading" in answers[0].text) == (503, True)
    front.process.terminate()
    assert front.wait() == 0, front.log
