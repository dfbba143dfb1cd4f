"""What the driver says of the agent's GPUs, as Prometheus metrics, asked when somebody scrapes: in the scraper's thread, never on the agent's loop.

A GPU that gives no figure has no sample; without a driver there are none at all. Seconds of GPU time by function come from the agent's own meter,
since the driver knows only whole GPUs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from contracts import metrics as names
from contracts.errors import Unavailable
from nodeagent.shell.nvml import THROTTLING, Nvml, Telemetry

_log = logging.getLogger(__name__)


class GpuCollector(Collector):
    """The metrics of `gpus`: device name ("cuda:0") -> UUID."""

    def __init__(self, gpus: Mapping[str, str], connect: Callable[[], Nvml] = Nvml) -> None:
        self._gpus = gpus
        self._connect = connect
        self._nvml: Nvml | None = None

    def describe(self) -> list[Metric]:
        """Empty, so that registering asks nothing of the driver."""
        return []

    def collect(self) -> Iterator[Metric]:
        """One set of samples."""
        try:
            nvml = self._nvml = self._nvml or self._connect()
        except Unavailable as error:
            _log.warning("no GPU metrics: %s", error)
            return
        try:
            found = {device: nvml.telemetry(nvml.by_uuid(uuid)) for device, uuid in self._gpus.items()}
        except nvml.library.NVMLError as error:
            # The driver may have been reloaded: the next scrape connects anew.
            self._nvml = None
            _log.warning("no GPU metrics: the driver says %s", error)
            return
        yield from _families(found)


def _families(found: Mapping[str, Telemetry]) -> Iterator[Metric]:
    busy = GaugeMetricFamily(names.GPU_BUSY_RATIO, "Part of the last sample period in which a kernel ran.", labels=["device"])
    memory = GaugeMetricFamily(names.GPU_MEMORY_USED_BYTES, "Bytes of device memory in use, by anybody.", labels=["device"])
    pcie = GaugeMetricFamily(names.GPU_PCIE_BYTES_PER_SECOND, "PCIe traffic over some 20 ms.", labels=["device", "direction"])
    errors = GaugeMetricFamily(names.GPU_MEMORY_ERRORS, "ECC errors since the driver was loaded.", labels=["device", "kind"])
    throttled = GaugeMetricFamily(names.GPU_THROTTLED, "1 while the clocks are held down for this reason.", labels=["device", "reason"])
    for device, seen in found.items():
        _add(busy, [device], None if seen.busy_percent is None else seen.busy_percent / 100)
        _add(memory, [device], seen.memory_used_bytes)
        _add(pcie, [device, "to_device"], seen.pcie_rx_bytes_per_s)
        _add(pcie, [device, "from_device"], seen.pcie_tx_bytes_per_s)
        _add(errors, [device, "corrected"], seen.corrected_errors)
        _add(errors, [device, "uncorrected"], seen.uncorrected_errors)
        for reason in THROTTLING:
            _add(throttled, [device, reason], int(reason in seen.throttled))
    yield from (busy, memory, pcie, errors, throttled)


def _add(family: GaugeMetricFamily, labels: list[str], value: float | None) -> None:
    if value is not None:
        family.add_metric(labels, value)
