"""How many functions one GPU keeps within their objectives: Sluice, keep-alive of whole models, and load on demand, all with the same arrivals.

Owns the node, the plain process beside it, and the order in which points are tried within the time there is. The GPU has memory for a tenth of the
fleet's weights, however much of the fleet is called.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import multiprocessing
import os
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field

import msgspec
import psutil
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.gpu_parts import baselines
from benchmarks.gpu_parts.answers import NEAR_PART, Outputs, separation
from benchmarks.gpu_parts.fleet import INPUTS, Fleet, Kind, Point, Search, Served, fleet, mix
from benchmarks.gpu_parts.sluice import Sluice
from benchmarks.node_parts.node import running
from contracts.errors import Unavailable
from contracts.functions import Share
from contracts.units import GIB

SLUICE = "sluice"
_UNHELD = "quota"
"""The backend of a GPU on which only lanes of all SMs are served."""
_HOST_PART = 0.7
_SHM_PART = 0.9
_DEVICE_PART = 10
_STEPS = 10
_SLACK_S = 10.0


@dataclass(frozen=True, slots=True)
class Size:
    """How much is measured, and on what.

    `sm_percent` is what each function has of the SMs under Sluice; all of them where nothing can hold lanes to less. `span_requests`: about so many
    requests of each function make a span. `host_bytes`: for weights; 0 takes what the machine has.
    """

    device: str
    kinds: tuple[Kind, ...]
    functions: int
    rates: tuple[float, ...]
    limit_s: float
    sm_percent: int = 100
    span_requests: float = 6.0
    host_bytes: int = 0
    seed: int = 7

    def span_s(self, rate: float) -> float:
        """How long a point at so many requests a minute and function takes."""
        return self.span_requests / rate * 60


@dataclass(frozen=True, slots=True)
class Kept:
    """What a system keeps at a rate: at least `least` functions, at most `most`, the same when the search was done; `best`: the point of `least`."""

    least: int = 0
    most: int = 0
    best: Point | None = None


@dataclass(slots=True)
class Found:
    """What was measured so far; `served`: every request by system; `load_s`: the time to load the fleet; `broken`: searches that an error ended."""

    fleet: Fleet
    device_bytes: int
    kept: dict[tuple[str, float], Kept] = field(default_factory=dict)
    served: dict[str, list[Served]] = field(default_factory=dict)
    sm_percent: int = 100
    load_s: float = 0.0
    broken: int = 0


Try = Callable[[int, float], Awaitable[Point]]
"""A system under so many functions, each called so many times a minute."""


async def measure(size: Size) -> Found:
    """All that the time allows. What goes wrong before the first point is raised, and nothing that goes wrong later."""
    until_s = time.monotonic() + size.limit_s
    served = fleet(size.kinds, mix([kind.nbytes for kind in size.kinds], size.functions, size.host_bytes or _host_bytes()))
    found = Found(served, max(served.nbytes // _DEVICE_PART, 2 * max(kind.nbytes for kind in size.kinds)))
    searched = False
    try:
        async with _systems(size, found) as systems:
            await _search(size, found, systems, until_s)
            searched = True
    except Exception:
        if not searched:
            raise
        traceback.print_exc()
    return found


@contextlib.asynccontextmanager
async def _systems(size: Size, found: Found) -> AsyncIterator[dict[str, Try]]:
    """The node and the plain process, both warm."""
    whole, loop = found.fleet, asyncio.get_running_loop()
    begun = time.monotonic()
    host_bytes = int(1.05 * whole.nbytes) + GIB
    async with contextlib.AsyncExitStack() as stack:
        node = await stack.enter_async_context(running(found.device_bytes, (size.device,), segment_bytes=GIB, host_memory=host_bytes))
        held = (await node.status()).devices[0].backend != _UNHELD
        found.sm_percent = size.sm_percent if held else 100
        share = Share(found.sm_percent)
        await stack.enter_async_context(node.serving(*(msgspec.structs.replace(function, share=share) for function in whole.functions)))
        found.load_s = time.monotonic() - begun
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as plain:
            references = await loop.run_in_executor(plain, baselines.begin, node.store, whole, size.device)
            _check_apart(whole, references)
            sluice = Sluice(node, whole, references, size.seed)
            found.served[SLUICE] = await sluice.warm_up(100 // found.sm_percent)

            def beside(policy: str) -> Try:
                def attempt(functions: int, rate: float) -> Awaitable[Point]:
                    return loop.run_in_executor(plain, baselines.point, policy, functions, rate, size.span_s(rate), found.device_bytes, size.seed)

                return attempt

            async def with_sluice(functions: int, rate: float) -> Point:
                return await sluice.point(functions, rate, size.span_s(rate))

            yield {SLUICE: with_sluice} | {policy: beside(policy) for policy in baselines.POLICIES}


async def _search(size: Size, found: Found, systems: dict[str, Try], until_s: float) -> None:
    """For each system, rate by rate, the greatest number that holds: no more than at the rate before, and about as much less as the rate is higher.

    Sluice comes first at all rates, for its lanes end when they are idle for long; then the others take turns. A system that breaks says why and is
    left alone at that rate.
    """
    whole = len(found.fleet.functions)
    step = max(1, whole // _STEPS)
    with Progress(TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=Console(stderr=True)) as progress:
        bar = progress.add_task("", total=size.limit_s)
        for name, rate, before_rate in _order(systems, size.rates):
            before = found.kept.get((name, before_rate), Kept(whole, whole))
            search = Search(step, before.most, max(step, round(before.least * before_rate / rate / step) * step))
            try:
                while (functions := search.next) is not None and (left_s := until_s - time.monotonic()) > size.span_s(rate) + _SLACK_S:
                    progress.update(bar, completed=size.limit_s - left_s, description=f"{rate:g} a minute, {name}, {functions} functions")
                    async with asyncio.timeout(left_s):
                        _note(found, name, search, await systems[name](functions, rate))
            except Exception:
                traceback.print_exc()
                found.broken += 1


def _order(systems: Iterable[str], rates: Sequence[float]) -> list[tuple[str, float, float]]:
    """System, rate, and the rate that was searched before it."""
    steps = list(zip(rates, (rates[0], *rates), strict=False))
    others = [name for name in systems if name != SLUICE]
    return [(SLUICE, *step) for step in steps] + [(name, *step) for step in steps for name in others]


def _note(found: Found, name: str, search: Search, point: Point) -> None:
    search.told(point.functions, not point.broken_off)
    before = found.kept.get((name, point.rate))
    best = (before.best if before else None) if point.broken_off else point
    found.kept[name, point.rate] = Kept(search.least, search.most, best)
    found.served.setdefault(name, []).extend(point.served)


def _host_bytes() -> int:
    """What weights may take of this machine's memory, and of the file system in memory that keeps them."""
    shm = os.statvfs("/dev/shm")
    return int(min(_HOST_PART * psutil.virtual_memory().available, _SHM_PART * shm.f_bavail * shm.f_frsize))


def _check_apart(whole: Fleet, references: list[list[Outputs]]) -> None:
    """Answers of different weights must differ by far more than what still counts as right."""
    for kind in set(whole.kinds.values()):
        numbers = [number for number, function in enumerate(whole.functions) if whole.kinds[function.name] == kind]
        for given in range(INPUTS if len(numbers) > 1 else 0):
            apart = separation([references[number][given] for number in numbers])
            if not 4 * NEAR_PART <= apart < math.inf:
                raise Unavailable(f"two functions of {kind.name} give answers only {apart:.2g} apart: wrong weights could pass for right ones")
