"""The agent's Prometheus metrics, made from its counters when somebody asks: nothing is counted twice and nothing slows the hot path.

Owns the HTTP server. The counters belong to the agent's loop, so a scrape asks there for a NodeStatus.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from contracts import metrics as names
from contracts.status import DeviceStatus, FunctionStatus, NodeStatus
from contracts.units import S
from nodeagent.shell.gpu_metrics import GpuCollector

_SCRAPE_S = 5.0


def serve(port: int, status: Callable[[], NodeStatus], gpus: Mapping[str, str]) -> tuple[int, Callable[[], None]]:
    """Serves on 127.0.0.1:`port` (0: any); returns the port and what stops it. `gpus`: device -> UUID. OSError when the port is taken."""
    registry = CollectorRegistry()
    loop = asyncio.get_running_loop()
    registry.register(_StatusCollector(lambda: asyncio.run_coroutine_threadsafe(_ask(status), loop).result(_SCRAPE_S)))
    if gpus:
        registry.register(GpuCollector(gpus))
    server, _ = start_http_server(port, "127.0.0.1", registry)

    def stop() -> None:
        server.shutdown()
        server.server_close()

    return server.server_port, stop


async def _ask(status: Callable[[], NodeStatus]) -> NodeStatus:
    return status()


class _StatusCollector(Collector):
    def __init__(self, status: Callable[[], NodeStatus]) -> None:
        self._status = status

    def describe(self) -> list[Metric]:
        """Empty, so that registering asks nothing of the loop."""
        return []

    def collect(self) -> Iterator[Metric]:
        status = self._status()
        yield GaugeMetricFamily(names.HOST_MEMORY_BYTES, "Bytes of the host weight store.", value=status.host_used_bytes)
        yield from _functions(status.functions)
        yield from _devices(status.devices)


def _functions(functions: tuple[FunctionStatus, ...]) -> Iterator[Metric]:
    seconds = CounterMetricFamily(names.GPU_SECONDS, "GPU time used.", labels=["function"])
    swaps = CounterMetricFamily(names.SWAPS, "Copies of a function's weights to a device.", labels=["function"])
    retries = CounterMetricFamily(names.RETRIES, "Batches run again because their lane was lost.", labels=["function"])
    sm = GaugeMetricFamily(names.SHARE_SM_PERCENT, "SM percentage of the share.", labels=["function"])
    quota = GaugeMetricFamily(names.SHARE_QUOTA_PERCENT, "Time quota of the share in percent.", labels=["function"])
    for function in functions:
        label = [function.key]
        seconds.add_metric(label, function.gpu_ns / S)
        swaps.add_metric(label, function.swaps)
        retries.add_metric(label, function.retried)
        sm.add_metric(label, function.share.sm_percent)
        quota.add_metric(label, function.share.quota_percent)
    yield from (seconds, swaps, retries, sm, quota)


def _devices(devices: tuple[DeviceStatus, ...]) -> Iterator[Metric]:
    used = GaugeMetricFamily(names.DEVICE_MEMORY_BYTES, "Bytes of weights on the device.", labels=["device"])
    swapped = CounterMetricFamily(names.SWAPPED_BYTES, "Bytes copied to the device.", labels=["device"])
    lanes = GaugeMetricFamily(names.LANES, "Lanes of the device.", labels=["device"])
    busy = CounterMetricFamily(names.DEVICE_BUSY_SECONDS, "GPU time used on the device, by all functions.", labels=["device"])
    for device in devices:
        used.add_metric([device.device], device.used_bytes)
        swapped.add_metric([device.device], device.swapped_bytes)
        lanes.add_metric([device.device], len(device.lanes))
        busy.add_metric([device.device], device.busy_ns / S)
    yield from (used, swapped, lanes, busy)
