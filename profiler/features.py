"""Features of a model's own graph: how much work a run is, by kind of operator, and how it grows with the batch.

Owns `Features`, its file form and its vector. Never imports torch: `profiler.tracing` counts, in a process of its own. A count is a straight line in
the batch (fixed + rows x row), which is what a network's operators are; weights are the greatest part of what is fixed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast, get_args

import msgspec
import numpy as np
from numpy.typing import NDArray

from contracts.errors import InvalidArtifact

VERSION = 1
Kind = Literal["convolution", "grouped", "matmul", "attention", "normalisation", "elementwise", "reduction", "movement"]
"""`grouped` are convolutions that mix no or few channels (depthwise), which are bound by memory; `movement` copies, gathers and joins."""
KINDS: tuple[Kind, ...] = get_args(Kind)

_TOTALS = ("log_flops", "log_bytes", "log_weight_bytes", "log_intensity", "log_kernels", "log_critical_path")
_PARTS = ("kernels", "flops", "bytes")
COLUMNS: tuple[str, ...] = _TOTALS + tuple(f"{kind}_{part}" for kind in KINDS for part in _PARTS)
"""Names of `Features.vector`'s columns: decadic logarithms of the totals, then each kind's fraction of the kernels, FLOPs and bytes."""


class Work(msgspec.Struct, frozen=True):
    """Operators of one kind. FLOPs and bytes of a run of n rows are `fixed + n * row`; `weight_bytes` are part of the fixed bytes."""

    kernels: int = 0
    weight_bytes: int = 0
    fixed_flops: float = 0
    row_flops: float = 0
    fixed_bytes: float = 0
    row_bytes: float = 0

    def flops(self, batch: int) -> float:
        """Floating-point operations of a run; a multiply-add counts as two."""
        return self.fixed_flops + batch * self.row_flops

    def bytes(self, batch: int) -> float:
        """Bytes read and written by a run, each tensor once an operator, without caches."""
        return self.fixed_bytes + batch * self.row_bytes


class Totals(msgspec.Struct, frozen=True):
    """A whole run of a batch."""

    kernels: int
    critical_path: int
    flops: float
    bytes: float
    weight_bytes: int

    @property
    def intensity(self) -> float:
        """FLOPs a byte: where a roofline places the run."""
        return self.flops / max(self.bytes, 1.0)


class Features(msgspec.Struct, frozen=True):
    """What a graph is. `critical_path` counts the kernels of the longest chain; `sizes` are the named dimensions (without the rows) it was taken at.

    `estimated` says that sizes of inner tensors were not known, and FLOPs by kind and bytes are approximations.
    """

    kinds: dict[Kind, Work]
    critical_path: int
    sizes: dict[str, int] = {}
    estimated: bool = False
    version: int = VERSION

    def totals(self, batch: int) -> Totals:
        """Sums over the kinds for a run of `batch` rows."""
        works = self.kinds.values()
        return Totals(
            kernels=sum(work.kernels for work in works),
            critical_path=self.critical_path,
            flops=sum(work.flops(batch) for work in works),
            bytes=sum(work.bytes(batch) for work in works),
            weight_bytes=sum(work.weight_bytes for work in works),
        )

    def vector(self, batch: int = 1) -> NDArray[np.float64]:
        """The columns of COLUMNS for a run of `batch` rows, always finite."""
        whole = self.totals(batch)
        numbers = [whole.flops, whole.bytes, whole.weight_bytes, whole.intensity, whole.kernels, whole.critical_path]
        found = [math.log10(1 + number) for number in numbers]
        for kind in KINDS:
            work = self.kinds.get(kind, Work())
            parts = ((work.kernels, whole.kernels), (work.flops(batch), whole.flops), (work.bytes(batch), whole.bytes))
            found += [part / max(total, 1.0) for part, total in parts]
        return np.array(found)


def from_runs(runs: Sequence[Mapping[Kind, Work]], rows: Sequence[int]) -> dict[Kind, Work]:
    """The straight lines through two runs of one graph, or the one run there is; the runs' counts stand in `fixed_flops` and `fixed_bytes`."""
    if len(runs) == 1:
        return dict(runs[0])
    few, many = rows

    def line(first: float, second: float) -> tuple[float, float]:
        row = (second - first) / (many - few)
        return first - few * row, row

    found: dict[Kind, Work] = {}
    for kind, work in runs[0].items():
        other = runs[1].get(kind, Work())
        fixed_flops, row_flops = line(work.fixed_flops, other.fixed_flops)
        fixed_bytes, row_bytes = line(work.fixed_bytes, other.fixed_bytes)
        found[kind] = Work(work.kernels, work.weight_bytes, fixed_flops, row_flops, fixed_bytes, row_bytes)
    return found


def encode(features: Features) -> bytes:
    """JSON."""
    return msgspec.json.encode(features)


def decode(data: bytes) -> Features:
    """Features from `encode`'s JSON; InvalidArtifact when it is torn, foreign or of another version."""
    try:
        features = msgspec.json.decode(data, type=Features)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise InvalidArtifact(f"are no features of a graph ({error})", key="features", value=data[:80]) from None
    if features.version != VERSION:
        raise InvalidArtifact(f"must be {VERSION}: written by another version of Sluice", key="features.version", value=features.version)
    return features


_FLOAT_BYTES = 4
_CONVOLUTIONS = ("nn.conv2d", "nn.dense", "transpose")
_PER_ELEMENT: Mapping[str, Kind] = {
    "nn.batch_norm": "normalisation",
    "nn.layer_norm": "normalisation",
    "nn.bias_add": "elementwise",
    "multiply": "elementwise",
}


def features_of_v100_graph(record: Mapping[str, Any]) -> Features:
    """Features of a graph as HAS-GPU's authors published it (graphs.jsonl.gz): the operators that hold weights, in order, and the total of GMACs.

    Such a record lacks the sizes of images. Networks for images halve them where they double the channels, so the positions are taken to fall with
    the square of the widest layer so far, and scaled so that the multiply-adds add up to the record's. A "reshape" or "transpose" there is the
    weight of a depthwise convolution or of a linear layer on every position.
    """
    layers = _layers(record["ops"])
    macs = sum(weights * positions for kind, weights, _, positions in layers if kind not in ("normalisation", "elementwise"))
    dense = sum(weights for kind, weights, _, positions in layers if kind == "matmul" and positions == 1)
    scale = max(record["gmacs"] * 1e9 - dense, 0.0) / max(macs - dense, 1e-9)
    found: dict[Kind, list[float]] = {}
    for kind, weights, channels, positions in layers:
        places = 1.0 if positions == 1 else positions * scale
        sums = found.setdefault(kind, [0.0] * 4)
        per_element = kind in ("normalisation", "elementwise")
        for index, amount in enumerate((1.0, weights, (channels if per_element else weights) * places * 2, 2 * channels * places)):
            sums[index] += amount
    if record["relus"]:
        outputs = [channels * positions * scale for kind, _, channels, positions in layers if kind in ("convolution", "grouped")]
        mean = sum(outputs) / max(len(outputs), 1)
        sums = found.setdefault("elementwise", [0.0] * 4)
        found["elementwise"] = [sums[0] + record["relus"], sums[1], sums[2] + record["relus"] * mean, sums[3] + 2 * record["relus"] * mean]
    kinds = {kind: _published(*sums) for kind, sums in found.items()}
    return Features(kinds, critical_path=sum(work.kernels for work in kinds.values()), estimated=True)


def _published(kernels: float, weights: float, flops: float, elements: float) -> Work:
    size = round(weights) * _FLOAT_BYTES
    return Work(round(kernels), size, 0.0, flops, float(size), elements * _FLOAT_BYTES)


def _layers(ops: Sequence[Mapping[str, Any]]) -> list[tuple[Kind, float, float, float]]:
    """(kind, weights, output channels, relative positions) of each operator; a linear layer at the end of a network has exactly one position."""
    widest = 1.0
    found: list[tuple[Kind, float, float, float]] = []
    for op in ops:
        shape = [size for size in op["shape"] if size]
        if op["op"] in _CONVOLUTIONS or op["op"] == "reshape":
            out, inner = float(shape[0]), float(math.prod(shape[1:]))
            grouped = op["op"] == "reshape" or (len(shape) == 4 and shape[1] == 1)
            head = op["op"] == "nn.dense"
            widest = widest if head else max(widest, out, 1.0 if grouped else float(shape[1]))
            kind = "grouped" if grouped else "convolution" if len(shape) == 4 else "matmul"
            found.append((cast(Kind, kind), out * inner, out, 1 if head else widest**-2))
        elif op["op"] in _PER_ELEMENT:
            found.append((_PER_ELEMENT[op["op"]], float(math.prod(shape)), float(shape[0]), widest**-2))
    return found
