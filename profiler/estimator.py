"""The estimator: (model, batch, share) -> latency with an uncertainty. Fit, condition on probes, predict, save, load.

Owns what a trained population of models says about the next one, and its file: arrays and a JSON header, nothing that executes on load.
Imports no torch and measures nothing. The law and its conditioning are in `profiler.law`.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from contracts.errors import InvalidArtifact, InvalidValue
from profiler.lattice import Array, Lattice, monotone, points
from profiler.law import Belief, condition, design, evaluate, untrained

VERSION = 1
_Z90 = 1.6449


@dataclass(frozen=True, slots=True)
class ModelSamples:
    """Measurements of one model on one device: equal-length arrays of configurations and latencies in ms (none at all is allowed for prediction).

    The latency may be any statistic (a mean, a p99), the same for all. `features` is the graph's vector, of one length throughout a population.
    """

    name: str
    device: str
    batch: npt.ArrayLike = ()
    sm_percent: npt.ArrayLike = ()
    quota_percent: npt.ArrayLike = ()
    latency_ms: npt.ArrayLike = ()
    features: npt.ArrayLike | None = None

    def rows(self) -> Array:
        """Configurations (n, 3); InvalidValue names the model and what is wrong with them."""
        try:
            return points(self.batch, self.sm_percent, self.quota_percent)
        except InvalidValue as error:
            raise InvalidValue(f"model {self.name!r}: {error.message}") from None

    def log_latency(self) -> Array:
        """Logarithms of the latencies (n,); InvalidValue for a latency that is not finite and above 0, or a wrong length."""
        found = np.atleast_1d(np.asarray(self.latency_ms, dtype=np.float64))
        if found.shape != (len(self.rows()),):
            raise InvalidValue(f"model {self.name!r}: {len(self.rows())} configurations need as many latencies, got {found.size}")
        wrong = ~(np.isfinite(found) & (found > 0))
        if wrong.any():
            raise InvalidValue(f"model {self.name!r}: latencies must be finite and above 0", key="latency_ms", value=float(found[wrong][0]))
        return np.log(found)


@dataclass(frozen=True, slots=True)
class Prediction:
    """Latencies in ms (n,): the middle and the ends of the 90 % interval. Each is non-increasing in SM and quota."""

    mean_ms: Array
    low_ms: Array
    high_ms: Array


class ModelEstimate:
    """What is known about one model on one device, after its probes."""

    def __init__(self, name: str, belief: Belief, probed: Array) -> None:
        self.name = name
        self._belief = belief
        self._probed = probed
        lattice = belief.lattice
        maps = design(lattice, lattice.rows())
        value, part, slope = evaluate(belief.mean, maps)
        variance = np.einsum("nu,uv,nv->n", slope, belief.covariance, slope, optimize=True).clip(0)
        noise = part * belief.device_noise**2 + (1 - part) * belief.host_noise**2
        self.sd = np.sqrt(variance).reshape(lattice.shape)
        width = _Z90 * np.sqrt(variance + noise)
        levels = [monotone(line.reshape(lattice.shape)) for line in (value, value - width, value + width)]
        self._levels = np.stack(levels)

    def predict(self, batch: npt.ArrayLike, sm_percent: npt.ArrayLike, quota_percent: npt.ArrayLike) -> Prediction:
        """Latencies at the configurations (arrays of one length, scalars repeated); outside the measured range time grows as 1 / share."""
        rows = points(batch, sm_percent, quota_percent)
        lattice = self._belief.lattice
        found = np.exp(lattice.read(self._levels, rows) + lattice.beyond(rows))
        return Prediction(found[0], found[1], found[2])

    def expected_error(self) -> float:
        """The mean absolute relative error that is to be expected over the lattice, without a measurement's own noise (0.05 is 5 %)."""
        return float(np.mean(self.sd) * np.sqrt(2 / np.pi))

    def next_probe(self, batch: npt.ArrayLike, sm_percent: npt.ArrayLike, quota_percent: npt.ArrayLike) -> int:
        """Index of the candidate whose measurement is expected to lower the total variance over the lattice most; measured ones come last."""
        rows = points(batch, sm_percent, quota_percent)
        belief = self._belief
        _, part, slope = evaluate(belief.mean, design(belief.lattice, rows))
        _, _, everywhere = evaluate(belief.mean, design(belief.lattice, belief.lattice.rows()))
        spread = belief.covariance @ slope.T
        noise = part * belief.device_noise**2 + (1 - part) * belief.host_noise**2
        gain = np.sum((everywhere @ spread) ** 2, axis=0) / (np.einsum("nu,un->n", slope, spread) + noise)
        known = (rows[:, None, :] == self._probed[None, :, :]).all(axis=2).any(axis=1)
        return int(np.argmax(np.where(known, gain - gain.max() - 1.0, gain)))


@dataclass(frozen=True, slots=True)
class Estimator:
    """A belief for each device about models that are yet unseen; a device without one is met with physics alone."""

    beliefs: dict[str, Belief] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def fit(cls, samples: Sequence[ModelSamples]) -> Estimator:
        """Learns from whole models; InvalidValue when there is none, or one that is wrong."""
        if not samples:
            raise InvalidValue("there is nothing to learn from: no measured models")
        beliefs = {}
        for device in sorted({model.device for model in samples}):
            rows = [model.rows() for model in samples if model.device == device]
            beliefs[device] = untrained(Lattice.over(rows))
        return cls(beliefs, {"models": {device: sum(model.device == device for model in samples) for device in beliefs}})

    def condition(self, probes: ModelSamples) -> ModelEstimate:
        """What the probes (maybe none) say about a model, known or not."""
        rows, log_latency = probes.rows(), probes.log_latency()
        belief = self.beliefs.get(probes.device) or untrained(Lattice.over([]))
        return ModelEstimate(probes.name, condition(belief, rows, log_latency), rows)

    def save(self, path: Path) -> None:
        """Writes arrays and a JSON header (npz), whole or not at all."""
        header = {"version": VERSION, "summary": self.summary, "devices": list(self.beliefs)}
        arrays: dict[str, Any] = {"header": np.frombuffer(json.dumps(header).encode(), dtype=np.uint8)}
        for index, belief in enumerate(self.beliefs.values()):
            for name, value in _parts(belief):
                arrays[f"{index}.{name}"] = value
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)
        partial = path.with_name(path.name + ".partial")
        partial.write_bytes(buffer.getvalue())
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> Estimator:
        """Reads `save`'s file without executing anything from it; InvalidArtifact when it is torn, foreign or of another version."""
        try:
            with np.load(path, allow_pickle=False) as file:
                header = json.loads(file["header"].tobytes())
                if header["version"] != VERSION:
                    raise InvalidArtifact(f"must be {VERSION}: fit it again with this Sluice", key=f"{path}: version", value=header["version"])
                beliefs = {device: _belief(file, index) for index, device in enumerate(header["devices"])}
                return cls(beliefs, dict(header["summary"]))
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
            if isinstance(error, FileNotFoundError):
                raise
            raise InvalidArtifact(f"{path} is no estimator, or a torn one ({error}): fit it again") from None


def _parts(belief: Belief) -> Iterable[tuple[str, Array]]:
    yield from zip(("batch", "sm_percent", "quota_percent"), belief.lattice.axes, strict=True)
    yield "mean", belief.mean
    yield "covariance", belief.covariance
    yield "noise", np.array([belief.device_noise, belief.host_noise])


def _belief(file: Any, index: int) -> Belief:
    found = {
        name: np.asarray(file[f"{index}.{name}"], dtype=np.float64)
        for name in ("batch", "sm_percent", "quota_percent", "mean", "covariance", "noise")
    }
    lattice = Lattice(found["batch"], found["sm_percent"], found["quota_percent"])
    return Belief(lattice, found["mean"], found["covariance"], float(found["noise"][0]), float(found["noise"][1]))
