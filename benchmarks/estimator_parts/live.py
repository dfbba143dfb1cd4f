"""An open-loop load on a whole node, as its users have it: `sluice up` as a process, V2 requests over HTTP, arrivals at random.

Owns the node and the load. A request counts from the moment at which it was due, so that a slow answer hides none of those behind it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from contracts.errors import Unavailable
from contracts.functions import API_VERSION, PREFIX, Function
from models.describe import describe
from models.samples import Arrays

_START_S = 120.0
_STOP_S = 30.0
_WARM_UP = 20


@dataclass(frozen=True, slots=True)
class Answered:
    """Latencies in ms of the requests that were answered, and how many were not."""

    latency_ms: tuple[float, ...]
    failed: int


def poisson(function: Function, inputs: Arrays, rate_per_s: float, seconds: float, seed: int) -> Answered:
    """Serves the function as it is (share, batch, SLO) and sends it these inputs at random times for so long."""
    arrivals = _arrivals(rate_per_s, seconds, seed)
    with _serving(function) as url:
        found = asyncio.run(_load(f"{url}/v2/models/{function.name}/infer", _body(function, inputs), arrivals))
    latencies = tuple(took for took in found if took is not None)
    return Answered(latencies, len(found) - len(latencies))


async def _load(url: str, body: bytes, arrivals: Sequence[float]) -> list[float | None]:
    """Latencies in ms of requests that are due at these seconds from now, after some that are not counted."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        for _ in range(_WARM_UP):
            await _ask(session, url, body)
        begun = time.monotonic()
        tasks = []
        for due in arrivals:
            await asyncio.sleep(max(0.0, begun + due - time.monotonic()))
            tasks.append(asyncio.create_task(_timed(session, url, body, begun + due)))
        return await asyncio.gather(*tasks)


def _arrivals(rate_per_s: float, seconds: float, seed: int) -> list[float]:
    draw = random.Random(seed)
    found, at = [], draw.expovariate(rate_per_s)
    while at < seconds:
        found.append(at)
        at += draw.expovariate(rate_per_s)
    return found


async def _timed(session: aiohttp.ClientSession, path: str, body: bytes, due: float) -> float | None:
    answered = await _ask(session, path, body)
    return 1e3 * (time.monotonic() - due) if answered else None


async def _ask(session: aiohttp.ClientSession, path: str, body: bytes) -> bool:
    async with session.post(path, data=body, headers={"Content-Type": "application/json"}) as response:
        await response.read()
        return response.status == 200


def _body(function: Function, inputs: Arrays) -> bytes:
    """A V2 request of these inputs."""
    specs = describe(function.model).signature.inputs
    tensors = [
        {"name": spec.name, "datatype": spec.dtype, "shape": inputs[spec.name].shape, "data": inputs[spec.name].reshape(-1).tolist()}
        for spec in specs
    ]
    return json.dumps({"inputs": tensors}).encode()


@contextlib.contextmanager
def _serving(function: Function) -> Iterator[str]:
    """The node's URL."""
    with tempfile.TemporaryDirectory(prefix="sluice-") as folder:
        file = Path(folder, "function.yaml")
        file.write_text(json.dumps(_document(function)))
        command = [sys.executable, "-m", "sluice", "up", str(file), "--port", "0", "--run-dir", f"{folder}/run", "--json"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            assert process.stdout is not None
            try:
                ready, _, _ = select.select([process.stdout], [], [], _START_S)
                line = process.stdout.readline() if ready else b""
                if not line:
                    raise Unavailable("the node did not start")
                yield json.loads(line)["url"]
            finally:
                process.terminate()
                try:
                    process.wait(_STOP_S)
                except subprocess.TimeoutExpired:
                    process.kill()


def _document(function: Function) -> dict[str, Any]:
    """The InferenceService of a function of the catalogue."""
    share, slo = function.share, function.slo
    notes = {
        "catalog": function.model.source,
        "sm-percent": share.sm_percent,
        "quota-percent": share.quota_percent,
        "quota-limit-percent": share.limit_percent,
        "slo-latency-ms": slo.latency_ns / 1e6,
        "slo-percentile": slo.percentile,
        "max-batch": function.max_batch,
    }
    return {
        "apiVersion": API_VERSION,
        "kind": "InferenceService",
        "metadata": {"name": function.name, "annotations": {PREFIX + key: str(value) for key, value in notes.items()}},
        "spec": {"predictor": {"model": {"runtime": "sluice", "modelFormat": {"name": function.model.format}}}},
    }
