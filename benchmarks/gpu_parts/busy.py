"""GPU seconds, as functions are charged for them, beside the time for which the driver says that the GPU was busy.

Owns the reading of NVML and the load: long batches of several functions back to back, so that the gaps between kernels count for nothing. Two clocks
that know nothing of one another: events on a lane's stream, and counters of the device (GPM, from Hopper on) or the driver's samples.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from benchmarks.node_parts.load import rows_for, saturated
from benchmarks.node_parts.node import Node, catalogued
from contracts.errors import Unavailable
from contracts.functions import Function, Share
from contracts.units import MS, S
from models.samples import sample_inputs
from nodeagent.shell.nvml import Nvml
from predictor.segment import Array

_BATCH_NS = 100 * MS
_INTERVAL_S = 0.5
_US = 1_000_000


@dataclass(frozen=True, slots=True)
class Busy:
    """Seconds: charged to all functions, busy as the driver says, and of the whole span. `by`: how the driver was asked."""

    charged_s: float
    busy_s: float
    span_s: float
    by: str

    @property
    def error_percent(self) -> float:
        """Of what was charged, against what was busy; positive when too much was charged."""
        return 100 * (self.charged_s / self.busy_s - 1)


class Observer(Protocol):
    """One way to ask the driver. Busy time counts from the making."""

    by: str

    def tick(self) -> None:
        """Takes note; to be called about twice a second, and at the end."""

    @property
    def busy_s(self) -> float:
        """Until the last tick."""


class Gpm:
    """By the counter of the graphics and compute engine (NVML_GPM_METRIC_GRAPHICS_UTIL), between samples that follow one another."""

    by = "GPM"

    def __init__(self, nvml: Nvml, handle: Any) -> None:
        """Unavailable where the device has no such counters, or does not show them."""
        self._library, self._handle = nvml.library, handle
        support = nvml.ask(self._library.nvmlGpmQueryDeviceSupport, handle)
        if support is None or not support.isSupportedDevice:
            raise Unavailable("this device has no GPM counters")
        self.busy_s = 0.0
        try:
            self._sample, self._at_s = self._take()
        except self._library.NVMLError as error:
            raise Unavailable(f"this device does not show its GPM counters ({error})") from None

    def tick(self) -> None:
        """As Observer.tick."""
        sample, at_s = self._take()
        question = self._library.c_nvmlGpmMetricsGet_t()
        question.version = self._library.NVML_GPM_METRICS_GET_VERSION
        question.numMetrics = 1
        question.sample1, question.sample2 = self._sample, sample
        question.metrics[0].metricId = self._library.NVML_GPM_METRIC_GRAPHICS_UTIL
        self._library.nvmlGpmMetricsGet(question)
        if question.metrics[0].nvmlReturn != self._library.NVML_SUCCESS:
            raise Unavailable(f"GPM gave no utilisation (NVML error {question.metrics[0].nvmlReturn})")
        self.busy_s += question.metrics[0].value / 100 * (at_s - self._at_s)
        self._library.nvmlGpmSampleFree(self._sample)
        self._sample, self._at_s = sample, at_s

    def _take(self) -> tuple[Any, float]:
        sample = self._library.nvmlGpmSampleAlloc()
        self._library.nvmlGpmSampleGet(self._handle, sample)
        return sample, time.monotonic()


class Samples:
    """By the driver's own samples of its utilisation, several a second, each in whole percent of the time since the one before."""

    by = "samples"

    def __init__(self, nvml: Nvml, handle: Any) -> None:
        """Unavailable where there are none."""
        self._nvml, self._handle = nvml, handle
        self._last_us = 0
        self.busy_s = 0.0
        self.tick()
        if not self._last_us:
            raise Unavailable("the driver keeps no samples of this device's utilisation")

    def tick(self) -> None:
        """As Observer.tick."""
        library = self._nvml.library
        found = self._nvml.ask(library.nvmlDeviceGetSamples, self._handle, library.NVML_GPU_UTILIZATION_SAMPLES, self._last_us)
        fresh = {sample.timeStamp: sample.sampleValue.uiVal for sample in found[1] if sample.timeStamp > self._last_us} if found else {}
        if fresh and not self._last_us:
            self._last_us = max(fresh)
            return
        for at_us, percent in sorted(fresh.items()):
            self.busy_s += percent / 100 * (at_us - self._last_us) / _US
            self._last_us = at_us


def observe(nvml: Nvml, handle: Any) -> Observer:
    """The best way that there is; Unavailable when there is none."""
    with contextlib.suppress(Unavailable):
        return Gpm(nvml, handle)
    return Samples(nvml, handle)


async def measure(node: Node, nvml: Nvml, index: int, sources: Sequence[str], seconds: float) -> Busy:
    """Every source is a function, and all want the whole device all the time. The span begins and ends with an idle device."""
    functions = [Function(f"busy-{number}", catalogued(source), share=Share.of(100, 10), max_batch=1024) for number, source in enumerate(sources)]
    async with node.serving(*functions):
        parts: list[Mapping[str, Array]] = [
            await rows_for(node, function.key, sample_inputs(function.model, 8, seed=1), _BATCH_NS) for function in functions
        ]
        await asyncio.sleep(2 * _INTERVAL_S)
        before_ns, begun = await _charged_ns(node), time.monotonic()
        observer = observe(nvml, nvml.handle(index))
        async with contextlib.AsyncExitStack() as load:
            for function, part in zip(functions, parts, strict=True):
                await load.enter_async_context(saturated(node, function.key, part, depth=2))
            while time.monotonic() < begun + seconds:
                await asyncio.sleep(_INTERVAL_S)
                await asyncio.to_thread(observer.tick)
        await asyncio.sleep(2 * _INTERVAL_S)
        await asyncio.to_thread(observer.tick)
        charged_ns = await _charged_ns(node) - before_ns
    return Busy(charged_ns / S, observer.busy_s, time.monotonic() - begun, observer.by)


async def _charged_ns(node: Node) -> int:
    return sum(line.gpu_ns for line in (await node.status()).functions)
