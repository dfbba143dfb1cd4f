"""Swaps on a GPU: how near a copy comes to the link's peak, and how much of a cold answer it hides behind the run.

The device holds the largest model and no other beside it, so that calling that one evicts all, and each of the others is cold once in each turn.
"""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from benchmarks.gpu_parts.bare import TOKENS
from benchmarks.node_parts.node import Node, catalogued
from contracts.functions import Function
from contracts.units import MIB, MS
from models.samples import sample_inputs
from predictor.segment import Array

_WARM_RUNS = 20
_IDLE_MOMENTS = 4
_IDLE_S = 0.5
_TABLE_BYTES = 512 * MIB
_WORD_BYTES = 4 * 128


@dataclass(frozen=True, slots=True)
class Swapped:
    """One model: weight bytes, and medians in ms of a cold answer, of a warm one, and of the GPU time of a warm run."""

    nbytes: int
    cold_ms: float
    warm_ms: float
    run_ms: float

    @property
    def copy_ms(self) -> float:
        """What a cold answer takes longer; of a model that hardly computes, its copy."""
        return self.cold_ms - self.warm_ms


def table(nbytes: int = _TABLE_BYTES) -> str:
    """A model of a vast table of word vectors that hardly computes: its cold answer is its copy."""
    words = nbytes // _WORD_BYTES
    return f"bert-base?num_hidden_layers=1&hidden_size=128&num_attention_heads=2&intermediate_size=128&vocab_size={words}"


async def measure(node: Node, sources: Mapping[str, str], largest: str, turns: int) -> dict[str, Swapped]:
    """Each model by its name: `turns` cold answers, each followed by warm ones; `largest` clears the device before each turn."""
    functions = {name: Function(name, catalogued(source)) for name, source in sources.items()}
    parts = {name: _part(function) for name, function in functions.items()}
    cold: dict[str, list[float]] = {name: [] for name in functions}
    warm: dict[str, list[float]] = {name: [] for name in functions}
    run: dict[str, list[float]] = {name: [] for name in functions}
    order = [largest, *(name for name in functions if name != largest)]
    async with node.serving(*functions.values()):
        for turn in range(1 + turns):
            for name in order:
                reply = await node.caller.call(functions[name].key, parts[name])
                if turn and reply.answer.cold:
                    cold[name].append(reply.total_ns / MS)
                for _ in range(_WARM_RUNS if turn else 3):
                    reply = await node.caller.call(functions[name].key, parts[name])
                    warm[name].append(reply.total_ns / MS)
                    run[name].append(reply.answer.run_ns / MS)
        nbytes = {name: (await node.function(function.key)).weight_bytes for name, function in functions.items()}
    return {name: Swapped(nbytes[name], *(statistics.median(found[name]) for found in (cold, warm, run))) for name in functions if cold[name]}


async def resident_ms(node: Node, source: str) -> float:
    """The GPU time of a warm run of a model that has had idle moments enough to be recorded as a graph, in ms."""
    function = Function("resident", catalogued(source))
    part = _part(function)
    run_ms: list[float] = []
    async with node.serving(function):
        for _ in range(_IDLE_MOMENTS):
            run_ms = [(await node.caller.call(function.key, part)).answer.run_ns / MS for _ in range(_WARM_RUNS)]
            await asyncio.sleep(_IDLE_S)
    return statistics.median(run_ms)


def _part(function: Function) -> dict[str, Array]:
    part = sample_inputs(function.model, 1, seed=1)
    return {name: np.resize(array, (1, TOKENS)) if array.dtype == np.int64 else array for name, array in part.items()}
