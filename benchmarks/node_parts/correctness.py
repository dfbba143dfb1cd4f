"""Correctness: many functions with weights of their own on a device that holds few of them; every answer against the same batch run without swapping.

Owns the functions, the seeded requests and the comparison, bit for bit, with models loaded in this process.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.node_parts.node import Node, catalogued, running
from contracts.artifact import ALIGNMENT
from contracts.functions import Function, FunctionClass, Share
from models.load import Loaded, load
from models.samples import sample_inputs
from predictor.segment import Array

_SOURCE = "mlp?features=64&width=256&depth=3&classes=32&seed={}"
_SAMPLES = 4
_SM_PERCENTS = (100, 50)
_ROWS = (1, 1, 2, 3, 5, 8)
_PARTS = (1, 1, 2, 4)
_IN_FLIGHT = 24

Part = Mapping[str, Array]


@dataclass(frozen=True, slots=True)
class Checked:
    """Requests asked and those answered wrongly; the first difference in words; swaps; how many functions the device has room for."""

    requests: int
    wrong: int
    detail: str
    swaps: int
    holds: int


async def measure(functions: int, holds: int, requests: int, seed: int) -> Checked:
    """`requests` batches of mixed sizes for functions chosen at random, of which the device holds `holds` at a time."""
    torch.set_num_threads(1)
    served = [_function(number) for number in range(functions)]
    models = {each.key: load(each.model) for each in served}
    weight_bytes = _weight_bytes(models[served[0].key])
    async with running(holds * weight_bytes, threads=1) as node, node.serving(*served):
        differences = await _ask(node, served, models, requests, random.Random(seed))
        device = (await node.status()).devices[0]
        line = await node.function(served[0].key)
    wrong = [text for text in differences if text]
    return Checked(requests, len(wrong), wrong[0] if wrong else "", device.swaps, device.capacity_bytes // line.weight_bytes)


def _function(number: int) -> Function:
    """Classes and SM percentages alternate, so that lanes of every kind share the device's memory."""
    cls = FunctionClass.BEST_EFFORT if number % 3 == 0 else FunctionClass.LATENCY_SENSITIVE
    return Function(f"mlp-{number}", catalogued(_SOURCE.format(number)), cls=cls, share=Share(_SM_PERCENTS[number % 2]), max_batch=64)


async def _ask(node: Node, served: list[Function], models: Mapping[str, Loaded], requests: int, chance: random.Random) -> list[str]:
    """What each answer differs in, "" for a right one. Some requests are always in flight."""
    samples = [sample_inputs(served[0].model, rows, seed) for rows in _ROWS for seed in range(_SAMPLES)]
    differences: list[str] = []

    def batches() -> Iterator[tuple[Function, list[Part]]]:
        for _ in range(requests):
            yield chance.choice(served), [chance.choice(samples) for _ in range(chance.choice(_PARTS))]

    async def work(todo: Iterator[tuple[Function, list[Part]]]) -> None:
        for function, parts in todo:
            reply = await node.caller.call(function.key, *parts)
            differences.append(_difference(models[function.key], parts, reply.outputs))

    todo = batches()
    await asyncio.gather(*(work(todo) for _ in range(_IN_FLIGHT)))
    return differences


def _difference(model: Loaded, parts: list[Part], outputs: tuple[Part, ...]) -> str:
    """Runs the batch that these parts make, and compares every part's rows bit for bit."""
    joined = {name: torch.from_numpy(np.concatenate([part[name] for part in parts])) for name in parts[0]}
    expected = {name: tensor.numpy() for name, tensor in model.run(joined).items()}
    ends = list(itertools.accumulate(len(next(iter(part.values()))) for part in parts))
    for end, part, output in zip(ends, parts, outputs, strict=True):
        rows = len(next(iter(part.values())))
        for name, array in expected.items():
            wanted = array[end - rows : end]
            if output[name].shape != wanted.shape or output[name].tobytes() != wanted.tobytes():
                return f"{name} of {len(parts)} parts, {ends[-1]} rows: {output[name].shape} instead of {wanted.shape}, or other values"
    return ""


def _weight_bytes(model: Loaded) -> int:
    """Room that the weights take on a device: each tensor aligned."""
    return sum(-(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for tensor in model.module.state_dict().values())
