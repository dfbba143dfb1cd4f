"""Churn: functions that come, are called, change their shares and go, at random: wrong answers, and what is left of them on the device."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.gpu_parts.answers import WRONG, Outputs, compare
from benchmarks.node_parts.node import Node, catalogued
from contracts.errors import SluiceError
from contracts.functions import Function, Share
from models.samples import sample_inputs

_WORKERS = 6
_CALLS = 8
_SHARES = (Share.of(100, 5), Share.of(50, 5), Share.of(25, 10))
_WARM_UP = 0.2


@dataclass(frozen=True, slots=True)
class Churned:
    """Answers, wrong ones, requests that failed, and device memory (bytes) after a fifth of the time and at the end, with no function left."""

    answers: int
    wrong: int
    failed: int
    bytes_early: int
    bytes_late: int


async def measure(node: Node, sources: Sequence[str], seconds: float, used_bytes: Callable[[], int], seed: int) -> Churned:
    """For so long; the memory is read when all functions of its part of the time have gone."""
    first: dict[str, Outputs] = {}
    early = await _phase(node, sources, _WARM_UP * seconds, first, seed)
    bytes_early = used_bytes()
    late = await _phase(node, sources, (1 - _WARM_UP) * seconds, first, seed + 1)
    answers, wrong, failed = (one + other for one, other in zip(early, late, strict=True))
    return Churned(answers, wrong, failed, bytes_early, used_bytes())


async def _phase(node: Node, sources: Sequence[str], seconds: float, first: dict[str, Outputs], seed: int) -> list[int]:
    """Answers, wrong ones, failed requests."""
    until_s = time.monotonic() + seconds
    counts = await asyncio.gather(*(_work(node, sources, until_s, first, random.Random(f"{seed} {number}"), number) for number in range(_WORKERS)))
    return [sum(column) for column in zip(*counts, strict=True)]


async def _work(
    node: Node, sources: Sequence[str], until_s: float, first: dict[str, Outputs], chance: random.Random, number: int
) -> tuple[int, int, int]:
    answers = wrong = failed = turn = 0
    while time.monotonic() < until_s:
        turn += 1
        source = chance.choice(sources)
        function = Function(f"churn-{number}-{turn}", catalogued(source), share=chance.choice(_SHARES), max_batch=8)
        part = sample_inputs(function.model, 1, seed=1)
        async with node.serving(function):
            for _ in range(chance.randint(1, _CALLS)):
                try:
                    if chance.random() < 0.2:
                        await node.control.set_share(function.key, chance.choice(_SHARES))
                    reply = await node.caller.call(function.key, part)
                except SluiceError:
                    failed += 1
                    continue
                answers += 1
                wrong += compare(reply.outputs[0], first.setdefault(source, reply.outputs[0])) == WRONG
    return answers, wrong, failed
