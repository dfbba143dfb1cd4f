"""The node that the tests of the protocols share, as `sluice up` starts it."""

from __future__ import annotations

import contextlib
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import yaml

from benchmarks.protocol_parts.models import export_identity
from benchmarks.protocol_parts.servers import HOST, Server, ours
from contracts.metrics import SEGMENT_USED_BYTES
from tests.protocol import models
from tests.protocol.outside.expected import IDENTITY, SPARE, TEXT

PATIENCE_S = 120.0


@dataclass(frozen=True)
class Node:
    """Where it listens, and its processes."""

    server: Server
    run_dir: Path

    @property
    def http(self) -> str:
        """host:port."""
        return f"{HOST}:{self.server.http_port}"

    @property
    def rpc(self) -> str:
        """host:port."""
        return f"{HOST}:{self.server.grpc_port}"

    def get(self, path: str) -> str:
        """A body."""
        with urllib.request.urlopen(self.server.url + path, timeout=PATIENCE_S) as response:
            return response.read().decode()

    def processes(self) -> dict[int, str]:
        """pid -> command line of every process that runs."""
        return {process.pid: " ".join(process.cmdline()) for process in self.server.process.children(recursive=True)}

    def predictor(self) -> psutil.Process:
        """The process that answers."""
        return next(one for one in self.server.process.children(recursive=True) if one.cmdline()[1:3] == ["-m", "predictor"])

    def segment_bytes(self) -> float:
        """Shared memory that requests hold."""
        line = next(line for line in self.get("/metrics").splitlines() if line.startswith(SEGMENT_USED_BYTES))
        return float(line.split()[-1])


def until(probe: Callable[[], object], what: Callable[[], str]) -> None:
    """Returns when `probe` is true; AssertionError after `PATIENCE_S`."""
    deadline = time.monotonic() + PATIENCE_S
    while not probe():
        assert time.monotonic() < deadline, f"not within {PATIENCE_S:.0f} s: {what()}"
        time.sleep(0.02)


def document(name: str, format_: str, source: str) -> dict[str, object]:
    """An InferenceService."""
    catalogued = {"sluice.dev/catalog": source} if format_ == "sluice-catalog" else {}
    notes = {"sluice.dev/quota-percent": "5", "sluice.dev/slo-latency-ms": "5000", "sluice.dev/max-batch": "16", **catalogued}
    model = {"runtime": "sluice", "modelFormat": {"name": format_}, **({} if catalogued else {"storageUri": f"file://{source}"})}
    metadata = {"name": name, "annotations": notes}
    return {"apiVersion": "serving.kserve.io/v1beta1", "kind": "InferenceService", "metadata": metadata, "spec": {"predictor": {"model": model}}}


@contextlib.contextmanager
def running() -> Iterator[Node]:
    """A node with the functions of `outside.expected`."""
    with tempfile.TemporaryDirectory(prefix="sluice-protocol-") as folder:
        programs = models.export(Path(folder))
        programs[IDENTITY] = Path(folder, "identity.pt2")
        export_identity(programs[IDENTITY])
        documents = [document(name, "torch-export", str(program)) for name, program in programs.items()]
        documents += [document(TEXT, "sluice-catalog", "minilm"), document(SPARE, "sluice-catalog", "mlp?features=16&width=8&depth=1&classes=2")]
        with ours(yaml.safe_dump_all(documents), "--device-memory", "256Mi") as (server, run_dir):
            yield Node(server, run_dir)
