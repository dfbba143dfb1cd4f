"""Open-loop load over HTTP: requests leave when they are due, whether or not earlier ones were answered, so that queueing shows.

Owns what was sent and what came back. It knows the protocol (Open Inference Protocol, JSON), never the node.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import aiohttp
import msgspec
import numpy as np
from numpy.typing import NDArray

from contracts.functions import Function

Tensors = Mapping[str, NDArray[np.generic]]

_ANSWER_WITHIN_S = 90.0
# A front that parses JSON shares the machine with the lanes: what one function may ask of it.
_MOST_PER_S = 12.0
_MOST_BYTES_PER_S = 2_000_000
_LEAST_PER_S = 0.25
_PART_OF_SHARE = 0.4
_DTYPES = {"BOOL": "bool", "FP16": "float16", "FP32": "float32", "FP64": "float64"}
_NAMES = {"bool": "BOOL", "float16": "FP16", "float32": "FP32", "float64": "FP64"}


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back for one request; `body` is empty unless it was answered. `latency_s` counts from when it was due."""

    sample: int
    status: int
    latency_s: float
    body: bytes
    instance: str = ""
    error: str = ""
    warm_up: bool = False

    @property
    def answered(self) -> bool:
        """Whether it holds an answer."""
        return self.status == 200

    @property
    def refused(self) -> bool:
        """Whether admission refused it: then nothing was accepted."""
        return self.status == 429


@dataclass(slots=True)
class Target:
    """One function under load: its samples, as request bodies, and every reply so far."""

    function: Function
    bodies: list[bytes]
    rate: float = 0.0
    replies: list[Reply] = field(default_factory=list)


class Answer(msgspec.Struct):
    """An answered request, decoded: its outputs, and its place in the batch that it ran in."""

    outputs: dict[str, NDArray[np.generic]]
    parameters: dict[str, float | int | bool | str]


def request_body(inputs: Tensors) -> bytes:
    """A V2 JSON request, of numbers or of text. Floats are written so that reading them gives the same bits."""
    tensors = [
        {"name": name, "shape": list(array.shape), "datatype": _datatype(array), "data": array.ravel().tolist()} for name, array in inputs.items()
    ]
    return msgspec.json.encode({"inputs": tensors})


def _datatype(array: NDArray[np.generic]) -> str:
    return "BYTES" if array.dtype.kind == "U" else _NAMES.get(array.dtype.name, array.dtype.name.upper())


def decode_answer(body: bytes) -> Answer:
    """A V2 JSON response; ValueError or KeyError when it is none."""
    document = msgspec.json.decode(body)
    outputs = {
        entry["name"]: np.array(entry["data"], dtype=_DTYPES.get(entry["datatype"], entry["datatype"].lower())).reshape(entry["shape"])
        for entry in document["outputs"]
    }
    return Answer(outputs, document.get("parameters") or {})


class Load:
    """Sends requests to `url`; `on_reply` is called after each."""

    def __init__(self, url: str, http: aiohttp.ClientSession, on_reply: Callable[[], None]) -> None:
        self._url = url
        self._http = http
        self._on_reply = on_reply

    async def ask(self, target: Target, sample: int, due_s: float, *, warm_up: bool = False) -> Reply:
        """One request, its reply kept with the target. Never raises for what the node does."""
        url = f"{self._url}/v2/models/{target.function.name}/infer"
        headers = {"Content-Type": "application/json"}
        status, body, instance, error = 0, b"", "", ""
        try:
            async with self._http.post(url, data=target.bodies[sample], headers=headers) as response:
                body = await response.read()
                status, instance = response.status, response.headers.get("Sluice-Instance", "")
            if status != 200:
                body, error = b"", f"{status}: {body[:300].decode(errors='replace')}"
        except (aiohttp.ClientError, TimeoutError) as failure:
            error = f"no answer: {type(failure).__name__} {failure}"
        reply = Reply(sample, status, time.monotonic() - due_s, body, instance, error, warm_up)
        target.replies.append(reply)
        self._on_reply()
        return reply

    async def drive(self, targets: list[Target], seconds: float, seed: int) -> None:
        """Poisson arrivals at every target's rate for so long; returns when each request has been answered or has failed."""
        async with asyncio.TaskGroup() as group:
            for target in targets:
                group.create_task(self._arrivals(group, target, seconds, random.Random(f"{seed}/{target.function.key}")))

    async def _arrivals(self, group: asyncio.TaskGroup, target: Target, seconds: float, draw: random.Random) -> None:
        start = time.monotonic()
        due = draw.expovariate(target.rate)
        while due < seconds:
            await asyncio.sleep(start + due - time.monotonic())
            group.create_task(self.ask(target, draw.randrange(len(target.bodies)), start + due))
            due += draw.expovariate(target.rate)


def session() -> aiohttp.ClientSession:
    """A session without a limit on connections: an open loop must not wait for one."""
    return aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=_ANSWER_WITHIN_S), connector=aiohttp.TCPConnector(limit=0))


def rate_for(function: Function, run_s: float, body_bytes: int) -> float:
    """Requests per second for a demo: two fifths of what the share guarantees when one takes `run_s`, within what one machine's front can parse."""
    guaranteed = function.share.quota_percent / 100 / max(run_s, 1e-6)
    return max(_LEAST_PER_S, min(_PART_OF_SHARE * guaranteed, _MOST_PER_S, _MOST_BYTES_PER_S / body_bytes))
