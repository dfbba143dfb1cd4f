"""What one function has done since it appeared, counted as Triton's statistics extension counts it. Pure: no clock, no protocol.

Owns plain sums; `predictor.metrics` feeds them with the very numbers that Prometheus gets.
https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_statistics.md
"""

from __future__ import annotations


class Duration:
    """How often something was done, and how long all of it took."""

    __slots__ = ("count", "ns")

    def __init__(self) -> None:
        self.count = 0
        self.ns = 0

    def add(self, ns: int) -> None:
        """Once more."""
        self.count += 1
        self.ns += ns

    def to_dict(self) -> dict[str, int]:
        """As Triton shows it."""
        return {"count": self.count, "ns": self.ns}


class Statistics:
    """The sums of one function. Times in ns.

    `inferences` are rows, `batches` the executions by their rows. `compute_infer` is the time of the batch that a request was part of, so over
    requests it adds up to more than the device's own, which `batches` has. `swap` is ours: the time that requests stood still for weights.
    """

    def __init__(self) -> None:
        self.success = Duration()
        self.fail = Duration()
        self.queue = Duration()
        self.swap = Duration()
        self.compute_input = Duration()
        self.compute_infer = Duration()
        self.compute_output = Duration()
        self.inferences = 0
        self.last_inference_ms = 0
        self.batches: dict[int, Duration] = {}

    @property
    def executions(self) -> int:
        """Batches that ran."""
        return sum(batch.count for batch in self.batches.values())

    def ran(self, rows: int, run_ns: int) -> None:
        """A batch of so many rows came back with its outputs."""
        batch = self.batches.get(rows)
        if batch is None:
            batch = self.batches[rows] = Duration()
        batch.add(run_ns)

    def to_dict(self) -> dict[str, object]:
        """Everything but the model's name and version."""
        none = Duration().to_dict()
        shown = ("success", "fail", "queue", "compute_input", "compute_infer", "compute_output", "swap")
        return {
            "last_inference": self.last_inference_ms,
            "inference_count": self.inferences,
            "execution_count": self.executions,
            "inference_stats": {**{name: getattr(self, name).to_dict() for name in shown}, "cache_hit": none, "cache_miss": none},
            "batch_stats": [
                {"batch_size": rows, "compute_input": none, "compute_infer": batch.to_dict(), "compute_output": none}
                for rows, batch in sorted(self.batches.items())
            ],
            "memory_usage": [],
        }
