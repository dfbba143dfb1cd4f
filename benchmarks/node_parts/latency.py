"""Latency: what the way predictor -> agent -> lane -> answer adds to the model's own time. One small model, warm, one request in flight.

The model's own time is the GPU time that the answer of the same request reports; everything else is the way.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from benchmarks.node_parts.node import Node, catalogued
from contracts.functions import Function
from contracts.units import MS
from models.samples import sample_inputs

_WARM_UP = 200


async def added_ms(node: Node, requests: int) -> NDArray[np.float64]:
    """The time added to each of `requests` requests of one row, in ms."""
    function = Function("small", catalogued("mlp"))
    part = sample_inputs(function.model, 1, seed=1)
    async with node.serving(function):
        replies = [await node.caller.call(function.key, part) for _ in range(_WARM_UP + requests)][_WARM_UP:]
    return np.array([reply.total_ns - reply.answer.run_ns for reply in replies]) / MS
