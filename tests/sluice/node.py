"""`sluice up` as a process on small models, as the tests drive it."""

from __future__ import annotations

import contextlib
import json
import select
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from click.testing import CliRunner

from nodeagent.shell.hoststore import store_folder
from sluice.cli import main
from tests.faults.census import alive, command

ROOT = Path(__file__).parents[2]
WITHIN_S = 200.0


def document(name: str, catalog: str, **notes: str) -> str:
    lines = "".join(f'\n    sluice.dev/{key.replace("_", "-")}: "{value}"' for key, value in {"catalog": catalog, **notes}.items())
    return (
        f"apiVersion: serving.kserve.io/v1beta1\nkind: InferenceService\nmetadata:\n  name: {name}\n  annotations:{lines}\n"
        "spec: {predictor: {model: {runtime: sluice, modelFormat: {name: sluice-catalog}}}}\n---\n"
    )


TWO = document("mlp-a", "mlp?features=4&seed=1", quota_percent="5") + document("mlp-b", "mlp?features=4&seed=2", quota_percent="5")


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WITHIN_S
    while not condition():
        assert time.monotonic() < deadline, "not within the deadline"
        time.sleep(0.02)


class Node:
    """`sluice up` as a user runs it, its JSON lines, and every process it ever had."""

    def __init__(self, folder: Path, documents: str, *options: str, for_people: bool = False) -> None:
        self.run_dir = folder / "run"
        (folder / "functions.yaml").write_text(documents)
        limits = ("--device-memory", "32Mi", "--host-memory", "256Mi", "--port", "0", "--run-dir", str(self.run_dir))
        form = () if for_people else ("--json",)
        self.log = folder / "up.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "sluice", "up", str(folder / "functions.yaml"), *limits, *form, *options],
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
            )
        self._family: dict[int, psutil.Process] = {}

    def line(self) -> Any:
        """The next JSON line; fails with the log when the process ends first."""
        assert self.process.stdout is not None
        assert select.select([self.process.stdout], [], [], WITHIN_S)[0], self.log.read_text()
        line = self.process.stdout.readline()
        assert line, self.log.read_text()
        self.remember()
        return json.loads(line)

    def remember(self) -> None:
        for process in psutil.Process(self.process.pid).children(recursive=True):
            self._family[process.pid] = process

    def children(self, word: str) -> list[psutil.Process]:
        """The direct children whose command line holds `word`."""
        return [child for child in psutil.Process(self.process.pid).children() if word in command(child)]

    def child(self, word: str) -> psutil.Process:
        """The only one."""
        (found,) = self.children(word)
        return found

    def end(self, number: int = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                self.remember()
            self.process.send_signal(number)
        code = self.process.wait(WITHIN_S)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code

    def left_behind(self) -> list[str]:
        """Whatever of the node is still there: files, shared memory, processes."""
        paths = [str(path) for path in (self.run_dir, store_folder(self.run_dir)) if path.exists()]
        return paths + [f"process {process.pid} {command(process)}" for process in self._family.values() if alive(process)]


def infer(url: str, name: str, value: float = 1.0) -> tuple[dict[str, Any], dict[str, str]]:
    inputs = [{"name": "features", "shape": [1, 4], "datatype": "FP32", "data": [value] * 4}]
    request = urllib.request.Request(f"{url}/v2/models/{name}/infer", json.dumps({"inputs": inputs}).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=WITHIN_S) as response:
        return json.loads(response.read()), dict(response.headers)


def serves(url: str, name: str) -> bool:
    try:
        return bool(infer(url, name)[0]["outputs"])
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def sluice(*arguments: str) -> Any:
    return CliRunner().invoke(main, arguments)
