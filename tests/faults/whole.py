"""`sluice up` as a process, and clients over HTTP that keep it busy and count what they get."""

from __future__ import annotations

import asyncio
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import psutil

from nodeagent.shell.hoststore import store_folder
from tests.faults import census
from tests.faults.real import FEATURES, PATIENCE_S, ROOT, expected, rows_of, until

WRITTEN = "{predictor: {model: {runtime: sluice, modelFormat: {name: sluice-catalog}}}}"


def document(name: str, catalog: str, cls: str = "latency-sensitive") -> str:
    """One InferenceService; a batch is one request, so that each answer can be compared bit for bit."""
    notes = {"catalog": catalog, "class": cls, "max-batch": "1", "quota-percent": "10", "slo-latency-ms": "10000"}
    lines = "".join(f'\n    sluice.dev/{key}: "{value}"' for key, value in notes.items())
    head = "apiVersion: serving.kserve.io/v1beta1\nkind: InferenceService\nmetadata:"
    return f"{head}\n  name: {name}\n  annotations:{lines}\nspec: {WRITTEN}\n---\n"


class Whole:
    """One node: supervisor, agent, predictor, and what the agent starts. `models`: name -> source."""

    def __init__(self, folder: Path, models: Mapping[str, str], *options: str) -> None:
        self.run_dir = folder / "run"
        self.store = store_folder(self.run_dir)
        self.mark = str(folder)
        self.log = folder / "up.log"
        self.models = models
        (folder / "functions.yaml").write_text(
            "".join(
                document(name, source, "best-effort" if number % 2 else "latency-sensitive") for number, (name, source) in enumerate(models.items())
            )
        )
        limits = ("--device-memory", "1280Ki", "--host-memory", "64Mi", "--port", "0", "--json", "--run-dir", str(self.run_dir))
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "sluice", "up", str(folder / "functions.yaml"), *limits, *options],
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, census.MARK: self.mark},
            )
        assert self.process.stdout is not None
        assert select.select([self.process.stdout], [], [], PATIENCE_S)[0], self.log.read_text()
        self.url: str = json.loads(self.process.stdout.readline() or f'"{self.log.read_text()}"')["url"]

    def one(self, role: str) -> psutil.Process:
        """Its only process of a role, waited for."""
        return until(lambda: census.of_role(self.mark, role), f"a process: {role}")[0]

    def settle(self) -> None:
        """Takes the census that later ones are compared with, without the loader."""
        census.end_loader(self.mark)
        self.before = census.take(self.mark, self.store)

    def leaks_nothing(self) -> None:
        """Waits until the node holds what it held when it had settled, and no more."""
        census.end_loader(self.mark)

        def leaked() -> str:
            return census.take(self.mark, self.store).leaked_since(self.before, len(self.models))

        until(lambda: not leaked(), lambda: f"leaked:\n{leaked()}\n{self.log.read_text()}")

    def end(self) -> int:
        """SIGTERM; the exit status, once nothing is left."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(PATIENCE_S)
        assert self.process.stdout is not None
        self.process.stdout.close()
        until(lambda: not census.family(self.mark), lambda: f"left behind: {census.family(self.mark)}")
        return code

    def kill(self) -> None:
        """Ends whatever is left of it, at once."""
        census.kill(census.family(self.mark))
        self.process.wait()
        shutil.rmtree(self.store, ignore_errors=True)


class Load:
    """Clients over HTTP in a thread of their own, each sending one request after another until `stop`.

    Each request has an id and inputs of its own. `outcomes` counts HTTP statuses, and "lost" for connections that ended before an answer.
    """

    def __init__(self, url: str, models: Mapping[str, str], clients: int = 6) -> None:
        self.outcomes: Counter[str] = Counter()
        self.served: Counter[str] = Counter()
        self.sent = 0
        self.wrong: list[str] = []
        self._url = url
        self._models = models
        self._clients = clients
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)
        self._thread.start()

    def serves_all(self) -> None:
        """Returns when every model has been answered twice more, rightly."""
        seen = self.served.copy()
        names = self._models
        until(lambda: all(self.served[name] > seen[name] + 1 for name in names) or self.wrong, lambda: f"answers of all: {self.served - seen}")
        assert not self.wrong, self.wrong

    def stop(self) -> Counter[str]:
        """Waits for what is under way; the outcomes, one for each request."""
        self._stopping.set()
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive(), "a request has no answer"
        assert not self.wrong, self.wrong
        assert self.outcomes.total() == self.sent
        return self.outcomes

    async def _run(self) -> None:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(PATIENCE_S)) as http, asyncio.TaskGroup() as group:
            for _ in range(self._clients):
                group.create_task(self._client(http))

    async def _client(self, http: aiohttp.ClientSession) -> None:
        names = list(self._models)
        while not self._stopping.is_set():
            self.sent += 1
            number = self.sent
            name = names[number % len(names)]
            try:
                self.outcomes[await self._ask(http, name, number)] += 1
            except (aiohttp.ClientError, ConnectionError):
                self.outcomes["lost"] += 1
                await asyncio.sleep(0.02)

    async def _ask(self, http: aiohttp.ClientSession, name: str, number: int) -> str:
        rows = rows_of(number)
        tensor = {"name": "features", "shape": [1, FEATURES], "datatype": "FP32", "data": rows.ravel().tolist()}
        body = {"id": f"request-{number}", "inputs": [tensor]}
        async with http.post(f"{self._url}/v2/models/{name}/infer", json=body) as response:
            answer: dict[str, Any] = await response.json(content_type=None)
            if response.status == 200:
                scores = np.asarray(answer["outputs"][0]["data"], np.float32).reshape(1, -1)
                if answer["id"] != body["id"] or not np.array_equal(scores, expected(self._models[name], rows)):
                    self.wrong.append(f"{name} {body['id']}: {answer}")
                self.served[name] += 1
            elif "error" not in answer:
                self.wrong.append(f"{response.status} without a reason: {answer}")
            return str(response.status)
