"""Requests small enough to paste: made from what a function's own metadata says it takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import aiohttp

from contracts.functions import Function

_MOST_ELEMENTS = 64
_FREE_DIMENSION = 4
_LINES = 2


async def small_inputs(url: str, functions: Sequence[Function]) -> list[tuple[Function, list[dict[str, Any]]]]:
    """For at most two functions with small inputs: the function and a V2 request's "inputs". Functions whose metadata cannot be read are left out."""
    found = []
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=30)) as http:
        for function in functions:
            try:
                async with http.get(f"{url}/v2/models/{function.name}") as response:
                    metadata = await response.json(content_type=None)
            except (aiohttp.ClientError, TimeoutError, ValueError):
                continue
            inputs = [_input(spec) for spec in metadata.get("inputs", ())]
            if inputs and sum(len(entry["data"]) for entry in inputs) <= _MOST_ELEMENTS:
                found.append((function, inputs))
            if len(found) == _LINES:
                break
    return found


def _input(spec: dict[str, Any]) -> dict[str, Any]:
    shape = [1 if place == 0 and size < 0 else _FREE_DIMENSION if size < 0 else size for place, size in enumerate(map(int, spec["shape"]))]
    value: float | bool = True if spec["datatype"] == "BOOL" else 0.5 if spec["datatype"].startswith(("FP", "BF")) else 1
    return {"name": spec["name"], "shape": shape, "datatype": spec["datatype"], "data": [value] * math.prod(shape)}
