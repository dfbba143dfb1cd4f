"""How fast the simulator is on one core, how its cost grows with the world, and how much memory a long trace takes.

The world is a cluster of GPUs of 32 GB, four to a node, that share some hundred vision and text models each, called 5 to 30 times a minute. Beside it
stand two harder ones: the same under a load that keeps the GPUs four fifths busy, and with memory for half of the models, so that a third of all
requests swap. Speed is requests over processor seconds, which are wall seconds on a free core; building the world is not counted.
"""

from __future__ import annotations

import math
import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from benchmarks.result import Metric
from simulator.run import simulate
from simulator.scenario import Devices, Group, Load, Scenario, Times, World, build

SEED = 1
_FUNCTIONS, _NODES, _PER_NODE = 1000, 6, 4
_CALLED = (5.0, 30.0)
_BUSY = (40.0, 150.0)
_SIZES = (100, 316, 1000, 3162, 10_000)
_N_LOG_N = 1 + math.log(math.log(_SIZES[-1]) / math.log(_SIZES[0])) / math.log(_SIZES[-1] / _SIZES[0])
"""The exponent that n log n has between the smallest and the largest size."""


def world(
    functions: int,
    nodes: int,
    requests: int,
    *,
    per_node: int = _PER_NODE,
    per_minute: tuple[float, float] = _CALLED,
    memory: str = "32Gi",
    seed: int = SEED,
) -> World:
    """`functions` on `nodes` with about so many requests in all; `per_minute`: of one function, from and to."""
    text = functions // 4
    load = Load(per_minute=list(per_minute))
    scenario = Scenario(
        name="speed",
        span_s=requests / (functions * sum(per_minute) / 2 / 60),
        devices=Devices(count=per_node, nodes=nodes, memory=memory, link_gb_per_s=12.0, per_link=2),
        functions=[
            Group("vision", load, Times(fixed_ms=6, row_ms=4), "98Mi", count=functions - text, slo_ms=80),
            Group("text", load, Times(fixed_ms=8, row_ms=10), "418Mi", count=text, slo_ms=200),
        ],
    )
    return build(scenario, seed)


def measure(quick: bool) -> dict[str, Metric]:
    """All figures of this part; about four minutes, `quick` a third of one."""
    requests = 20_000 if quick else 200_000
    usual = world(_FUNCTIONS, _NODES, requests)
    busy = world(_FUNCTIONS, _NODES, requests, per_minute=_BUSY)
    swapping = world(_FUNCTIONS, _NODES, requests, memory="4Gi")
    metrics = {
        "requests_per_s": Metric(_requests_per_s(usual), "requests/s", 25_000, "higher"),
        "requests_per_s_busy": Metric(_requests_per_s(busy), "requests/s"),
        "requests_per_s_swapping": Metric(_requests_per_s(swapping), "requests/s"),
    }
    return metrics | _growth(quick) | _memory(requests) | _parallel(requests)


def _requests_per_s(of: World) -> float:
    begun = time.process_time()
    simulate("sluice", of)
    return len(of.arrivals) / (time.process_time() - begun)


def _growth(quick: bool) -> dict[str, Metric]:
    """Processor time of a request in worlds of all sizes, devices and load in proportion; and the exponent of the cost of a whole world."""
    each = 4 if quick else 20
    costs_us = {}
    for functions in _SIZES[:-1] if quick else _SIZES:
        turns = max(1, 20_000 // (each * functions))
        costs_us[functions] = statistics.median(_cost_us(functions, each * functions, seed) for seed in range(turns))
    slope = statistics.linear_regression([math.log(n) for n in costs_us], [math.log(us) for us in costs_us.values()]).slope
    return {f"cost_us_{functions}": Metric(us, "us/request") for functions, us in costs_us.items()} | {
        "cost_exponent": Metric(1 + slope, "", _N_LOG_N)
    }


def _cost_us(functions: int, requests: int, seed: int) -> float:
    """The load of a device is the same whatever the size: what rounding to whole nodes changes is taken out of the rates."""
    devices = functions * _NODES * _PER_NODE / _FUNCTIONS
    nodes = max(1, round(devices / _PER_NODE))
    per_node = min(_PER_NODE, round(devices / nodes)) if nodes == 1 else _PER_NODE
    scale = nodes * per_node / devices
    low, high = _CALLED
    return 1e6 / _requests_per_s(world(functions, nodes, requests, per_node=per_node, per_minute=(low * scale, high * scale), seed=seed))


def _memory(requests: int) -> dict[str, Metric]:
    """What a simulation takes beside its trace, each in a fresh process: for so many requests, and by how much four times as many take more.

    What grows are histograms, ever more slowly, until each function has met every latency that it ever will. A day is 25 million requests, so 20
    bytes for each would be 500 MB.
    """
    short, long = (_apart(_taken_bytes, count) for count in (requests, 4 * requests))
    return {
        "memory_mb": Metric(long / 1e6, "MB", 500),
        "memory_growth_bytes_per_request": Metric((long - short) / (3 * requests), "bytes", 20),
    }


def _taken_bytes(requests: int) -> int:
    of = world(_FUNCTIONS, _NODES, requests)
    before = _status()["VmRSS"]
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from now
    simulate("sluice", of)
    return _status()["VmHWM"] - before


def _status() -> Mapping[str, int]:
    """Memory of the present process in bytes, from /proc/self/status."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if words[-1] == "kB"}


def _apart(act: Callable[[int], int], argument: int) -> int:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(act, argument).result()


def _parallel(requests: int) -> dict[str, Metric]:
    """Two seeds one after the other, and at once."""
    with ProcessPoolExecutor(2) as pool:
        list(pool.map(_play, (SEED, SEED + 1), (1000, 1000)))
        begun = time.perf_counter()
        for seed in (SEED, SEED + 1):
            pool.submit(_play, seed, requests).result()
        apart_s = time.perf_counter() - begun
        begun = time.perf_counter()
        list(pool.map(_play, (SEED, SEED + 1), (requests, requests)))
        return {"two_seeds_speedup": Metric(apart_s / (time.perf_counter() - begun), "times", 1.7, "higher")}


def _play(seed: int, requests: int) -> None:
    simulate("sluice", world(_FUNCTIONS, _NODES, requests, seed=seed))
