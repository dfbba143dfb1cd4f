"""The servers of the protocol benchmark as processes: ours as `sluice up` starts it, KServe's own, and an echo.

Owns the processes and ends them however the benchmark ends. Measures nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from sluice.ports import free_port

ROOT = Path(__file__).parents[2]
HOST = "127.0.0.1"
_START_S = 120.0
_STOP_S = 60.0
_POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class Server:
    """One that listens; `grpc_port` 0 where there is no gRPC."""

    process: psutil.Popen
    http_port: int
    grpc_port: int = 0

    @property
    def url(self) -> str:
        """Its HTTP address."""
        return f"http://{HOST}:{self.http_port}"

    def cpu_s(self) -> dict[int, float]:
        """CPU seconds of each of its processes until now, by process id."""
        found = {}
        for process in (self.process, *self.process.children(recursive=True)):
            with contextlib.suppress(psutil.Error):  # it has just ended
                times = process.cpu_times()
                found[process.pid] = times.user + times.system
        return found

    def port(self, kind: str) -> int:
        """Where requests of this kind go."""
        return self.grpc_port if kind == "grpc" else self.http_port


@contextlib.contextmanager
def ours(documents: str, *options: str) -> Iterator[tuple[Server, Path]]:
    """`sluice up` on these InferenceServices, each of them served, or RuntimeError. Gives its run directory too."""
    with tempfile.TemporaryDirectory(prefix="sluice-") as name, (Path(name) / "log").open("w+b") as log:
        folder = Path(name)
        (folder / "functions.yaml").write_text(documents)
        grpc_port = free_port(HOST)
        options = ("--port", "0", "--grpc-port", str(grpc_port), "--run-dir", str(folder / "run"), "--json", *options)
        with running("sluice", "up", str(folder / "functions.yaml"), *options, log=log.fileno()) as process:
            ready, _, _ = select.select([process.stdout], [], [], _START_S)
            line = process.stdout.readline() if ready else b""
            if not line or json.loads(line)["failed"]:
                log.seek(0)
                raise RuntimeError(f"sluice up does not serve: {line!r}\n{log.read().decode()}")
            yield Server(process, int(json.loads(line)["url"].rpartition(":")[2]), grpc_port), folder / "run"


@contextlib.contextmanager
def stock() -> Iterator[Server]:
    """KServe's own server."""
    http_port, grpc_port = free_port(HOST), free_port(HOST)
    with running("benchmarks.protocol_parts.stock", str(http_port), str(grpc_port)) as process:
        server = Server(process, http_port, grpc_port)
        _await_http(server)
        yield server


@contextlib.contextmanager
def echo() -> Iterator[Server]:
    """A bare Starlette echo."""
    port = free_port(HOST)
    with running("benchmarks.protocol_parts.echo", str(port)) as process:
        server = Server(process, port)
        _await_http(server)
        yield server


@contextlib.contextmanager
def running(module: str, *arguments: str, log: int | None = None) -> Iterator[psutil.Popen]:
    """`python -m module`, its standard input and output piped; ended with the block."""
    pipe = subprocess.PIPE
    process = psutil.Popen([sys.executable, "-m", module, *arguments], cwd=ROOT, stdin=pipe, stdout=pipe, stderr=log, env=_environment())
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            process.communicate(timeout=_STOP_S)
        except subprocess.TimeoutExpired:
            for child in [*process.children(recursive=True), process]:
                child.kill()
            process.communicate()


def _environment() -> dict[str, str]:
    """One compute thread for every server alike; KServe's use of FastAPI warns at every request."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def _await_http(server: Server) -> None:
    deadline = time.monotonic() + _START_S
    while True:
        with contextlib.suppress(urllib.error.URLError, ConnectionError):
            urllib.request.urlopen(server.url + "/v2/health/live", timeout=5).close()
            return
        if server.process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"{server.process.args} does not serve")
        time.sleep(_POLL_S)
