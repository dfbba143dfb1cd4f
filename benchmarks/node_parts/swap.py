"""Swaps: how fast weights come over, and how much of a swap a cold run hides.

Functions of at least 100 MB take turns on a device that holds one of them, so that each run is cold. `table` hardly computes (a vast table of word
vectors), so its cold time is the copy alone; `vision` runs longer than it copies; `network` computes less than it copies; `text` cannot begin before
its word vectors are there, a fifth of a BERT-base. Each turn also measures a plain memcpy of the same bytes, alone and beside a warm run: where cores
share their way to memory, no swap can hide better than those two do.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import mmap
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.node_parts.node import Node, catalogued
from contracts.functions import Function
from models.samples import sample_inputs
from predictor.segment import Array

_WARM_RUNS = 3
_TEXT_TOKENS = 128
_TABLE_TOKENS = 8
_TABLE_WORD_BYTES = 4 * 128
_LAYER_BYTES = 4 * 7_087_872
_SQUARE_BYTES = 4 * 1024 * 1024
_WORDS_BYTES = 100_000_000


@dataclass(frozen=True, slots=True)
class Case:
    """A function whose swaps are measured, and its batch."""

    function: Function
    part: Mapping[str, Array]


def cases(layers: int) -> dict[str, Case]:
    """The functions by name; the transformers have this many of their 12 layers, the others as many bytes."""
    nbytes = layers * _LAYER_BYTES
    return {
        "table": _case(
            "table",
            f"bert-base?num_hidden_layers=1&hidden_size=128&num_attention_heads=2&intermediate_size=128&vocab_size={nbytes // _TABLE_WORD_BYTES}",
            _TABLE_TOKENS,
        ),
        "vision": _case("vision", f"vit-b?image_size=112&num_hidden_layers={layers}"),
        "network": _case("network", f"mlp?width=1024&depth={nbytes // _SQUARE_BYTES}"),
        "text": _case("text", f"bert-base?num_hidden_layers={layers}", _TEXT_TOKENS),
    }


def device_bytes(layers: int) -> int:
    """A device that holds any one of them, and no two."""
    return _WORDS_BYTES + layers * _LAYER_BYTES


def _case(name: str, source: str, tokens: int = 0) -> Case:
    """One row; a text is as long as `tokens` says."""
    function = Function(name, catalogued(source))
    part = sample_inputs(function.model, 1, seed=1)
    return Case(function, {key: np.resize(array, (1, tokens)) for key, array in part.items()} if tokens else part)


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn: the bytes of each function; in ns a memcpy of the table's bytes, and of each function the cold time and the warm time.

    `beside_ns`: until a warm run and such a memcpy, begun together, have both ended.
    """

    nbytes: Mapping[str, int]
    memcpy_ns: float
    cold_ns: Mapping[str, float]
    run_ns: Mapping[str, float]
    beside_ns: Mapping[str, float]

    @property
    def copy_ns(self) -> float:
        """The copy of the table's weights alone: from its request to its answer, without its run."""
        return self.cold_ns["table"] - self.run_ns["table"]

    @property
    def copy_ratio(self) -> float:
        """Bytes a second of a swap over those of a memcpy."""
        return self.memcpy_ns / self.copy_ns

    def cold_ratio(self, name: str) -> float:
        """A cold run over the longer of its copy alone and its run alone."""
        return self.cold_ns[name] / max(self.copy_ns * self.nbytes[name] / self.nbytes["table"], self.run_ns[name])

    def beside_ratio(self, name: str) -> float:
        """The same for a run and a memcpy of the table's bytes that have nothing to do with each other: the best that this machine allows."""
        return self.beside_ns[name] / max(self.memcpy_ns, self.run_ns[name])


async def measure(node: Node, named: Mapping[str, Case], turns: int) -> list[Turn]:
    """`turns` turns, after one that is not counted."""
    async with node.serving(*(case.function for case in named.values())):
        nbytes = {name: (await node.function(case.function.key)).weight_bytes for name, case in named.items()}
        with _memcpy(node.store, nbytes["table"]) as copy:
            return [await _turn(node, named, nbytes, copy) for _ in range(1 + turns)][1:]


async def _turn(node: Node, named: Mapping[str, Case], nbytes: Mapping[str, int], copy: Callable[[], float]) -> Turn:
    cold_ns: dict[str, float] = {}
    run_ns: dict[str, float] = {}
    beside_ns: dict[str, float] = {}
    memcpy_ns = []
    for name, case in named.items():
        cold = await node.caller.call(case.function.key, case.part)
        assert cold.answer.cold, f"{name} should have been evicted by the others"
        cold_ns[name] = cold.total_ns
        warm = [await node.caller.call(case.function.key, case.part) for _ in range(_WARM_RUNS)]
        run_ns[name] = float(np.median([reply.total_ns for reply in warm]))
        memcpy_ns.append(copy())
        begun_ns = time.monotonic_ns()
        await asyncio.gather(asyncio.to_thread(copy), node.caller.call(case.function.key, case.part))
        beside_ns[name] = time.monotonic_ns() - begun_ns
    return Turn(nbytes, float(np.median(memcpy_ns)), cold_ns, run_ns, beside_ns)


@contextlib.contextmanager
def _memcpy(store: Path, nbytes: int) -> Iterator[Callable[[], float]]:
    """A function that copies the very host weights of that size into shared memory as a slab is, with libc's memcpy, and says how many ns it took."""
    (path,) = [path for path in store.glob("*.weights") if path.stat().st_size == nbytes]
    with path.open("rb") as file:
        source = np.frombuffer(mmap.mmap(file.fileno(), nbytes, prot=mmap.PROT_READ), np.uint8)
    fd = os.memfd_create("sluice-benchmark", os.MFD_CLOEXEC)
    os.ftruncate(fd, nbytes)
    target = np.frombuffer(mmap.mmap(fd, nbytes), np.uint8)
    os.close(fd)

    def copy() -> float:
        begun_ns = time.monotonic_ns()
        ctypes.memmove(target.ctypes.data, source.ctypes.data, nbytes)
        return time.monotonic_ns() - begun_ns

    copy()
    yield copy
