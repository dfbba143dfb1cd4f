"""The real predictor front as a process, for tests: started against a (fake) agent's socket, stopped with SIGTERM, and asked over HTTP."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx

ROOT = Path(__file__).resolve().parents[2]


class Front:
    """One running front; `log` is what it wrote."""

    def __init__(self, agent_socket: Path, *arguments: str) -> None:
        command = [sys.executable, "-m", "predictor", "--agent", str(agent_socket), "--http-port", "0", "--segment-bytes", "1Mi", *arguments]
        self.process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        self.log = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.until(lambda: "serving on http" in self.log or self.process.poll() is not None)
        found = re.search(r"serving on (http://[\w.:]+)", self.log)
        assert found, self.log
        self.url = found[1]
        self.http = httpx.Client(base_url=self.url, timeout=120)

    @property
    def grpc_address(self) -> str:
        """Where gRPC is served; only with --grpc-port."""
        found = re.search(r"serving gRPC on ([\w.:]+)", self.log)
        assert found, self.log
        return found[1]

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log += line

    def until(self, condition: Callable[[], bool], timeout_s: float = 120) -> None:
        """Polls until something is so."""
        end = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < end, f"waited in vain; the front said:\n{self.log}"
            time.sleep(0.005)

    def ready(self, *names: str) -> Front:
        """Waits until these models are ready."""
        self.until(lambda: all(self.http.get(f"/v2/models/{name}/ready").status_code == 200 for name in names))
        return self

    def predict(self, name: str, *rows: object, **headers: str) -> httpx.Response:
        """V1."""
        return self.http.post(f"/v1/models/{name}:predict", json={"instances": rows}, headers=headers)

    def metric(self, name: str, **labels: str) -> float:
        """The value of one line of /metrics; 0 when there is none."""
        shown = "{" + ",".join(f'{key}="{value}"' for key, value in labels.items()) + "}" if labels else ""
        for line in self.http.get("/metrics").text.splitlines():
            if line.startswith(f"{name}{shown} "):
                return float(line.rsplit(" ", 1)[1])
        return 0.0

    def stop(self) -> int:
        """SIGTERM, and the exit status."""
        self.process.terminate()
        return self.wait()

    def wait(self) -> int:
        """The exit status, once it has ended."""
        status = self.process.wait(30)
        self._reader.join()
        self.http.close()
        return status
