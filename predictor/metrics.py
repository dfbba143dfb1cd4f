"""What the predictor measures, on the registry that KServe's server shows at /metrics.

Owns the Prometheus objects, and beside them the sums that Triton's statistics show: one call feeds both. Decides nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

from contracts import metrics as names
from contracts.units import MS, S
from predictor.statistics import Statistics

_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class Metrics:
    """Every metric of one predictor process, before it is split by function."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        def seconds(name: str, what: str) -> Histogram:
            return Histogram(name, what, ["function"], buckets=_SECONDS, registry=registry)

        self.total = seconds(names.REQUEST_SECONDS, "From a request's arrival to its answer")
        self.queue = seconds(names.QUEUE_SECONDS, "Waiting in predictor and agent")
        self.swap = seconds(names.SWAP_SECONDS, "Standing still for weights")
        self.run = seconds(names.RUN_SECONDS, "GPU time of the batch that the request ran in")
        self.rows = Histogram(names.BATCH_ROWS, "Rows in a batch", ["function"], buckets=_ROWS, registry=registry)
        self.requests = Counter(names.REQUESTS, "Requests by outcome: ok, or the kind of error", ["function", "outcome"], registry=registry)
        self.refusals = Counter(names.REFUSALS, "Requests that admission refused", ["function"], registry=registry)
        self.retries = Counter(names.RETRIES, "Batches that were submitted again after the agent was lost", ["function"], registry=registry)
        self.in_flight = Gauge(names.IN_FLIGHT, "Requests that wait for their answer", ["function"], registry=registry)
        self._segment = Gauge(names.SEGMENT_USED_BYTES, "Shared memory that requests hold", registry=registry)

    def watch_segment(self, used_bytes: Callable[[], int]) -> None:
        """Reads the segment's use whenever somebody looks."""
        self._segment.set_function(used_bytes)


class FunctionMetrics:
    """The metrics of one function, their labels resolved once."""

    def __init__(self, metrics: Metrics, function: str, in_flight: Callable[[], int]) -> None:
        self._metrics = metrics
        self._function = function
        self._outcomes: dict[str, Counter] = {}
        self.statistics = Statistics()
        self.total = metrics.total.labels(function)
        self.queue = metrics.queue.labels(function)
        self.swap = metrics.swap.labels(function)
        self.run = metrics.run.labels(function)
        self.rows = metrics.rows.labels(function)
        self.refusals = metrics.refusals.labels(function)
        self.retries = metrics.retries.labels(function)
        metrics.in_flight.labels(function).set_function(in_flight)

    def succeeded(self, total_ns: int, input_ns: int, output_ns: int) -> None:
        """A request was answered: its whole time, and how much of that was decoding and encoding."""
        self._count("ok")
        self.total.observe(total_ns / S)
        self.statistics.success.add(total_ns)
        self.statistics.compute_input.add(input_ns)
        self.statistics.compute_output.add(output_ns)

    def failed(self, outcome: str, total_ns: int) -> None:
        """A request ended without an answer; `outcome` is the kind of error."""
        self._count(outcome)
        self.statistics.fail.add(total_ns)

    def ran(self, rows: int, run_ns: int) -> None:
        """A batch came back with its outputs."""
        self.statistics.ran(rows, run_ns)
        self.statistics.last_inference_ms = time.time_ns() // MS

    def answered(self, rows: int, queue_ns: int, swap_ns: int, run_ns: int) -> None:
        """The parts of one answered request's time."""
        self.queue.observe(queue_ns / S)
        self.swap.observe(swap_ns / S)
        self.run.observe(run_ns / S)
        self.statistics.inferences += rows
        self.statistics.queue.add(queue_ns)
        self.statistics.swap.add(swap_ns)
        self.statistics.compute_infer.add(run_ns)

    def _count(self, outcome: str) -> None:
        counter = self._outcomes.get(outcome)
        if counter is None:
            counter = self._outcomes[outcome] = self._metrics.requests.labels(self._function, outcome)
        counter.inc()

    def forget(self) -> None:
        """The function is gone: its lines go too."""
        every = self._metrics
        for metric in (every.total, every.queue, every.swap, every.run, every.rows, every.refusals, every.retries, every.in_flight):
            metric.remove(self._function)
        for outcome in self._outcomes:
            every.requests.remove(self._function, outcome)
