"""Sluice on a real GPU, against what the same GPU does without it: swaps, SM caps, shares, a best-effort neighbour, overhead, graphs, churn.

Each part has an agent of its own and fails by itself: one that breaks says why and counts as failed, and the others go on. One for which no time is
left counts as failed, too; the most telling parts come first. SLUICE_DEVICE names another device than cuda:0, SLUICE_LIMIT_S another time than 330 s.
On the CPU device it only shows that the benchmark works.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.gpu_parts import busy, caps, churn, swap
from benchmarks.gpu_parts.fleet import weight_bytes
from benchmarks.node_parts import latency, preemption, shares
from benchmarks.node_parts.node import catalogued, running
from benchmarks.result import Metric, Result
from contracts.errors import Unavailable
from contracts.functions import Function, FunctionClass, Share
from contracts.units import GIB, MIB, MS
from nodeagent.shell.nvml import Nvml

_SEED = 7
_MODELS = {name: f"{name}?seed=1" for name in ("resnet50", "resnet152", "bert-base", "bert-large", "vit-l", "gpt2-xl")}
_LONG = "mlp?width=4096&depth=16"
_CHURNED = ("resnet50?seed={}", "bert-base?num_hidden_layers=4&seed={}", "cnn?seed={}", "mlp?seed={}")
_PERCENTS = (10, 25, 50, 75, 100)
_LIMIT_S = "330"
_LEAST_S = 10.0
_BARE_S = 150.0
_GPU_MEMORY = 8 * GIB


Bare = dict[str, Any]
"""What the GPU does without Sluice: "link" and each model's source -> figures."""


@dataclass(frozen=True, slots=True)
class Size:
    """How much is measured, and on what."""

    device: str
    models: Mapping[str, str]
    largest: str
    long: str
    turns: int
    share_s: float
    calls: int
    load_turns: int
    load_s: float
    churn_s: float
    churned: tuple[str, ...]
    busy_s: float
    limit_s: float
    percents: tuple[int, ...] = _PERCENTS
    device_bytes: int = _GPU_MEMORY


def run(quick: bool) -> Result:
    """All parts, one after another."""
    device = os.environ.get("SLUICE_DEVICE", "cuda:0")
    limit_s = float(os.environ.get("SLUICE_LIMIT_S", _LIMIT_S))
    churned = tuple(source.format(seed) for source in _CHURNED for seed in (1, 2))
    if quick:
        models = {name: _MODELS[name] for name in ("resnet50", "bert-large")}
        size = Size(device, models, "bert-large", _LONG, 3, 2, 400, 1, 2, 10, churned, busy_s=4, limit_s=limit_s)
    else:
        size = Size(device, _MODELS, "gpt2-xl", _LONG, 10, 8, 4000, 2, 6, 40, churned, busy_s=12, limit_s=limit_s)
    return Result(asyncio.run(measure(size)), seeds=(_SEED,))


async def measure(size: Size) -> dict[str, Metric]:
    """The figures of every part that could be measured, and of each whether it failed and how long it took."""
    metrics: dict[str, Metric] = {}
    bare: Bare = {}
    until_s = time.monotonic() + size.limit_s
    for part in (_peaks, _swap, _overhead, _graph, _caps, _quota, _busy, _neighbour, _churn):
        name, begun = part.__name__.strip("_"), time.monotonic()
        try:
            if until_s - begun < _LEAST_S:
                raise TimeoutError(f"no time is left for {name}")
            async with asyncio.timeout(until_s - begun):
                metrics |= await part(size, bare)
            failed = 0
        except Exception:
            traceback.print_exc()
            failed = 1
        metrics[f"part_{name}_failed"] = Metric(failed, "parts", 0)
        metrics[f"seconds_of_{name}"] = Metric(time.monotonic() - begun, "s")
    return metrics


async def _peaks(size: Size, bare: Bare) -> dict[str, Metric]:
    """What the GPU does without Sluice; `bare` keeps it for the parts that come after."""
    if size.device.startswith("cuda"):
        bare["link"] = await _output("predictor.worker.devices.link")
    bare |= await _output("benchmarks.gpu_parts.bare", *size.models.values())
    found = {f"bare_{name}_{key}": Metric(bare[source][key], "ms") for name, source in size.models.items() if source in bare for key in _BARE}
    if not found:
        raise Unavailable("no model could be run without Sluice")
    return found | {f"peak_{key}": Metric(value / 1e9, "GB/s") for key, value in bare.get("link", {}).items()}


_BARE = ("warm_ms", "graph_ms", "to_device_ms", "pinned_ms", "host_waits_ms")


async def _swap(size: Size, bare: Bare) -> dict[str, Metric]:
    largest = weight_bytes(size.models[size.largest])
    sources = dict(size.models) | {"table": swap.table(min(512 * MIB, largest // 2))}
    async with running(largest, (size.device,), host_memory=16 * GIB) as node:
        found = await swap.measure(node, sources, size.largest, size.turns)
    table = found["table"]
    bytes_per_ms = table.nbytes / table.copy_ms
    metrics = {"swap_gb_per_s": Metric(bytes_per_ms / 1e6, "GB/s")}
    peak = bare.get("link", {}).get("h2d_bytes_per_s")
    if peak:
        metrics["swap_of_peak_percent"] = Metric(100 * bytes_per_ms * 1e3 / peak, "%", 92, "higher")
    for name, one in found.items():
        if name != "table":
            copy_ms = one.nbytes / (peak / 1e3 if peak else bytes_per_ms)
            metrics |= {
                f"cold_{name}_ms": Metric(one.cold_ms, "ms"),
                f"cold_{name}_bound_ms": Metric(max(copy_ms, one.run_ms), "ms"),
                f"cold_{name}_ratio": Metric((one.cold_ms - 1) / max(copy_ms, one.run_ms), "ratio", 1.10),
                f"warm_{name}_ms": Metric(one.run_ms, "ms"),
            }
    return metrics


async def _graph(size: Size, bare: Bare) -> dict[str, Metric]:
    """A resident model whose graph was recorded in idle time."""
    source = size.models.get("resnet50")
    if source is None or not bare.get(source, {}).get("graph_ms"):
        return {}
    async with running(GIB, (size.device,)) as node:
        run_ms = await swap.resident_ms(node, source)
    return {"graph_replay_ratio": Metric(run_ms / bare[source]["graph_ms"], "ratio", 1.05)}


async def _caps(size: Size, _: object) -> dict[str, Metric]:
    async with running(size.device_bytes, (size.device,)) as node:
        found = await caps.measure(node, f"{size.long}&seed=1", size.percents)
    return {
        **{f"cap_{percent}_speed_percent": Metric(speed, "% of the whole") for percent, speed in found.speed.items()},
        "cap_worst_percent": Metric(found.worst_percent, "% off", 10),
        "sm_change_late_batches": Metric(found.late_batches, "batches", 1),
    }


async def _quota(size: Size, _: object) -> dict[str, Metric]:
    async with running(size.device_bytes, (size.device,)) as node:
        found = await shares.compete(node, {"thirty": (30.0, 30.0), "sixty": (60.0, 60.0)}, 20 * MS, size.share_s, size.long)
    return {
        "quota_error_points": Metric(max(abs(found.percent["thirty"] - 30), abs(found.percent["sixty"] - 60)), "points", 1),
        "quota_lost": Metric(found.lost, "requests", 0),
    }


async def _busy(size: Size, _: object) -> dict[str, Metric]:
    """Only a GPU has a driver that says how busy it was."""
    kind, _, number = size.device.partition(":")
    if kind != "cuda":
        return {}
    with Nvml() as nvml:
        async with running(size.device_bytes, (size.device,)) as node:
            found = await busy.measure(node, nvml, int(number), [f"{size.long}&seed={seed}" for seed in (1, 2, 3)], size.busy_s)
    return {
        "gpu_seconds_error_percent": Metric(abs(found.error_percent), "%", 2),
        "gpu_seconds_charged": Metric(found.charged_s, "s"),
        "gpu_seconds_busy": Metric(found.busy_s, "s"),
        "gpu_seconds_by_counters": Metric(found.by == busy.Gpm.by, "yes or no"),
    }


async def _neighbour(size: Size, _: object) -> dict[str, Metric]:
    """The tail of a latency-sensitive function beside one that never pauses: best-effort under a cap, and a peer without any control."""
    urgent = Function("urgent", catalogued(next(iter(size.models.values()))), share=Share.of(50, 90))
    held = Function("patient", catalogued(size.long), cls=FunctionClass.BEST_EFFORT, share=Share.of(50, 1), max_batch=1024)
    free = Function("peer", catalogued(size.long), share=Share.of(100, 1, 100), max_batch=1024)
    metrics: dict[str, Metric] = {}
    for name, neighbour in (("held", held), ("free", free)):
        async with running(size.device_bytes, (size.device,)) as node:
            found = await preemption.measure(node, size.load_turns, size.load_s, _SEED, urgent, neighbour)
        metrics |= {
            f"neighbour_{name}_alone_p99_ms": Metric(float(np.percentile(found.alone_ms, 99)), "ms"),
            f"neighbour_{name}_p99_ratio": Metric(found.p99_ratio, "ratio"),
        }
    return metrics


async def _overhead(size: Size, _: object) -> dict[str, Metric]:
    async with running(GIB, (size.device,)) as node:
        added_ms = await latency.added_ms(node, size.calls)
    return {"added_latency_p50_us": Metric(1e3 * float(np.percentile(added_ms, 50)), "us", 150)}


async def _churn(size: Size, _: object) -> dict[str, Metric]:
    async with running(GIB, (size.device,)) as node:
        found = await churn.measure(node, size.churned, size.churn_s, lambda: _used_bytes(size.device), _SEED)
    return {
        "churn_answers": Metric(found.answers, "answers"),
        "churn_wrong": Metric(found.wrong, "answers", 0),
        "churn_failed": Metric(found.failed, "requests", 0),
        "churn_growth_mib": Metric((found.bytes_late - found.bytes_early) / MIB, "MiB", 32),
    }


def _used_bytes(device: str) -> int:
    """Of the GPU, by anybody; 0 on the CPU device."""
    kind, _, number = device.partition(":")
    if kind != "cuda":
        return 0
    with Nvml() as nvml:
        return nvml.telemetry(nvml.handle(int(number))).memory_used_bytes or 0


async def _output(module: str, *arguments: str) -> Bare:
    """The JSON that a program of ours prints."""

    def ask() -> Bare:
        done = subprocess.run([sys.executable, "-m", module, *arguments], stdout=subprocess.PIPE, text=True, check=True, timeout=_BARE_S)
        found: Bare = json.loads(done.stdout.splitlines()[-1])
        return found

    return await asyncio.to_thread(ask)
