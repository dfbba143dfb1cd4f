"""An open-loop load on a whole node, as its users have it: `sluice up` as a process, binary V2 requests over HTTP, at times that were given before.

Owns the node and the load. A request counts from the moment at which it was due, so that a slow answer hides none of those behind it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import select
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

from contracts.errors import Unavailable
from contracts.functions import API_VERSION, PREFIX, Function
from models.describe import describe
from models.samples import Arrays

_START_S = 120.0
_STOP_S = 30.0
_LENGTH = "Inference-Header-Content-Length"


@dataclass(frozen=True, slots=True)
class Node:
    """Where a node is reached."""

    url: str
    run_dir: Path


@dataclass(frozen=True, slots=True)
class Request:
    """A V2 request: `head` bytes of JSON, then the tensors."""

    function: str
    body: bytes
    head: int

    @classmethod
    def of(cls, function: Function, inputs: Arrays) -> Request:
        """Of these inputs, which are sent as they are."""
        tensors = [np.ascontiguousarray(inputs[spec.name]) for spec in describe(function.model).signature.inputs]
        specs = [
            {"name": spec.name, "datatype": spec.dtype, "shape": array.shape, "parameters": {"binary_data_size": array.nbytes}}
            for spec, array in zip(describe(function.model).signature.inputs, tensors, strict=True)
        ]
        head = json.dumps({"inputs": specs, "parameters": {"binary_data_output": True}}).encode()
        return cls(function.name, head + b"".join(array.tobytes() for array in tensors), len(head))


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer: ms from when the request was due until it was there, and how the node says that it spent them."""

    latency_ms: float
    queue_ms: float
    swap_ms: float
    run_ms: float
    cold: bool
    rows: int

    @property
    def around_ms(self) -> float:
        """What was spent on neither waiting, swapping nor running."""
        return self.latency_ms - self.queue_ms - self.swap_ms - self.run_ms


@contextlib.contextmanager
def serving(functions: Sequence[Function], *options: str) -> Iterator[Node]:
    """`sluice up` with these functions of the catalogue as they are (share, batch, SLO), and these options."""
    with tempfile.TemporaryDirectory(prefix="sluice-") as folder:
        file, run_dir = Path(folder, "functions.yaml"), Path(folder, "run")
        file.write_text("\n---\n".join(json.dumps(_document(function)) for function in functions))
        command = [sys.executable, "-m", "sluice", "up", str(file), "--port", "0", "--run-dir", str(run_dir), "--json", *options]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            assert process.stdout is not None
            try:
                ready, _, _ = select.select([process.stdout], [], [], _START_S)
                line = json.loads(process.stdout.readline() or "null") if ready else None
                if line is None or line["failed"]:
                    raise Unavailable("the node did not start" if line is None else f"the node does not serve {', '.join(line['failed'])}")
                yield Node(line["url"], run_dir)
            finally:
                process.terminate()
                try:
                    process.wait(_STOP_S)
                except subprocess.TimeoutExpired:
                    process.kill()


def play(node: Node, requests: Sequence[tuple[float, Request]]) -> list[Reply | None]:
    """Sends each request when it is due (seconds from now, ascending); in their order the answers, None for one that was not answered."""
    # The usual epoll loop wakes up to a millisecond late, which would count as latency; select takes microseconds.
    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selectors.SelectSelector())) as runner:
        return runner.run(_play(node, requests))


async def _play(node: Node, requests: Sequence[tuple[float, Request]]) -> list[Reply | None]:
    async with aiohttp.ClientSession(node.url, connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(_START_S)) as session:
        begun = time.monotonic()
        tasks = []
        for due, request in requests:
            await asyncio.sleep(max(0.0, begun + due - time.monotonic()))
            tasks.append(asyncio.create_task(_ask(session, request, begun + due)))
        return [_reply(found) for found in await asyncio.gather(*tasks)]


_Answer = tuple[float, bytes, Mapping[str, str]]


async def _ask(session: aiohttp.ClientSession, request: Request, due: float) -> _Answer | None:
    headers = {"Content-Type": "application/octet-stream", _LENGTH: str(request.head)}
    async with session.post(f"/v2/models/{request.function}/infer", data=request.body, headers=headers) as response:
        body = await response.read()
        return (time.monotonic() - due, body, response.headers) if response.status == 200 else None


def _reply(answer: _Answer | None) -> Reply | None:
    """Decoded when all is over: the load is not to wait for it."""
    if answer is None:
        return None
    took_s, body, headers = answer
    told = json.loads(body[: int(headers.get(_LENGTH, len(body)))])["parameters"]
    queue_ms, swap_ms, run_ms = (told[f"sluice_{part}_ms"] for part in ("queue", "swap", "run"))
    return Reply(1e3 * took_s, queue_ms, swap_ms, run_ms, told["sluice_cold"], told["sluice_batch_rows"])


def _document(function: Function) -> dict[str, Any]:
    """The InferenceService of a function of the catalogue."""
    share, slo = function.share, function.slo
    notes = {
        "catalog": function.model.source,
        "class": function.cls.value,
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
