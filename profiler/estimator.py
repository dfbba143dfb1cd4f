"""The estimator: (model, batch, share) -> latency with an uncertainty. Fit, condition on probes, predict, save, load.

Owns what a trained population of models says about the next one, and its file: arrays and a JSON header, nothing that executes on load.
Imports no torch and measures nothing. The law and its conditioning are in `profiler.law`.
"""

from __future__ import annotations

import hashlib
import io
import json
import platform
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from contracts.errors import InvalidArtifact, InvalidValue
from profiler.lattice import Array, Lattice, monotone, points
from profiler.law import Belief, Posterior, Session, condition, parts, physics
from profiler.population import Population, learn
from profiler.probes import best_probe

VERSION = 2
_Z90 = 1.6449


@dataclass(frozen=True, slots=True)
class ModelSamples:
    """Measurements of one model on one device: equal-length arrays of configurations and latencies in ms (none at all is allowed for prediction).

    The latency may be any statistic (a mean, a p99), the same for all. `features` is the graph's vector, of one length throughout a population;
    models whose graphs are alike are expected to be alike. `spread`: standard errors of the latencies' logarithms, where repetition tells them (0
    where not); a fit of a population takes all measurements for equally good.
    """

    name: str
    device: str
    batch: npt.ArrayLike = ()
    sm_percent: npt.ArrayLike = ()
    quota_percent: npt.ArrayLike = ()
    latency_ms: npt.ArrayLike = ()
    features: npt.ArrayLike | None = None
    spread: npt.ArrayLike = ()

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

    def errors(self) -> Array:
        """The spreads (n,), 0 where there are none; InvalidValue for one that is negative or no number, or a wrong length."""
        found = np.atleast_1d(np.asarray(self.spread, dtype=np.float64))
        if not found.size:
            return np.zeros(len(self.rows()))
        if found.shape != (len(self.rows()),) or not (np.isfinite(found) & (found >= 0)).all():
            raise InvalidValue(f"model {self.name!r}: a spread of 0 or more for each latency", key="spread", value=found.tolist())
        return found

    def graph(self) -> Array | None:
        """The features as a vector (f,); InvalidValue when one is no finite number."""
        if self.features is None:
            return None
        found = np.asarray(self.features, dtype=np.float64).ravel()
        if not np.isfinite(found).all():
            raise InvalidValue(f"model {self.name!r}: its graph's features must be finite", key="features", value=found.tolist())
        return found


@dataclass(frozen=True, slots=True)
class Prediction:
    """Latencies in ms (n,): the middle and the ends of the 90 % interval. Each is non-increasing in SM and quota."""

    mean_ms: Array
    low_ms: Array
    high_ms: Array

    def lines(self) -> tuple[Array, Array, Array]:
        """Middle, lower and upper end."""
        return self.mean_ms, self.low_ms, self.high_ms


class ModelEstimate:
    """What is known about one model on one device, after its probes."""

    def __init__(self, name: str, population: Population, probes: tuple[Array, Array, Array], features: Array | None) -> None:
        """`probes`: rows (n, 3), log latencies (n,) and their standard errors (n,)."""
        self.name = name
        self._population = population
        self._lattice = population.belief.lattice
        self._probes = probes
        self._features = features

    @cached_property
    def _posterior(self) -> Posterior:
        """Of a model that is like some of the population more than like others."""
        return condition(self._population.like(*self._probes[:2], self._features), *self._probes)

    @cached_property
    def _open(self) -> Posterior:
        """Of a model that may be any: the wider one, so that probes are not only taken where the likeness leaves room."""
        return condition(self._population.belief, *self._probes) if len(self._population.members) else self._posterior

    @cached_property
    def sd(self) -> Array:
        """Standard deviations of the logarithm of the latency over the lattice."""
        return np.asarray(np.sqrt(np.diag(self._posterior.covariance).clip(0)), dtype=np.float64)

    @cached_property
    def _levels(self) -> Array:
        """Middle, lower and upper end on the lattice (3, *shape), as logarithms."""
        width = _Z90 * np.sqrt((self._population.belief.caution * self.sd) ** 2 + self._posterior.noise)
        value = self._posterior.value
        middle, low, high = (monotone(line.reshape(self._lattice.shape)) for line in (value, value - width, value + width))
        return np.stack([middle, np.minimum(low, middle), np.maximum(high, middle)])

    def predict(self, batch: npt.ArrayLike, sm_percent: npt.ArrayLike, quota_percent: npt.ArrayLike) -> Prediction:
        """Latencies at the configurations (arrays of one length, scalars repeated); outside the measured range time grows as 1 / share."""
        rows = points(batch, sm_percent, quota_percent)
        found = np.exp(self._lattice.read(self._levels, rows) + self._lattice.beyond(rows))
        return Prediction(found[0], found[1], found[2])

    def expected_error(self) -> float:
        """The mean absolute relative error that is to be expected over the lattice, without a measurement's own noise (0.05 is 5 %)."""
        return float(np.mean(self.sd) * np.sqrt(2 / np.pi))

    def next_probe(self, batch: npt.ArrayLike, sm_percent: npt.ArrayLike, quota_percent: npt.ArrayLike) -> int:
        """Index of the candidate whose measurement is expected to lower the total variance over the lattice most; measured ones come last."""
        return best_probe(self._lattice, self._open, points(batch, sm_percent, quota_percent), self._probes[0])


@dataclass(frozen=True, slots=True)
class Estimator:
    """What is known of each device's models; a device without any is met with physics alone."""

    beliefs: dict[str, Population] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def fit(cls, samples: Sequence[ModelSamples]) -> Estimator:
        """Learns from measured models, whatever their grids; InvalidValue when there is none, or one that is wrong or empty."""
        if not samples:
            raise InvalidValue("there is nothing to learn from: no measured models")
        for model in samples:
            if not len(model.errors()):
                raise InvalidValue(f"model {model.name!r} has no measurements on device {model.device!r}: leave it out, or measure it")
        beliefs = {}
        for device in sorted({model.device for model in samples}):
            measured = [(model.rows(), model.log_latency(), model.graph()) for model in samples if model.device == device]
            beliefs[device] = learn(Lattice.over([rows for rows, *_ in measured]), measured)
        return cls(beliefs, _summary(samples))

    def condition(self, probes: ModelSamples) -> ModelEstimate:
        """What the probes (maybe none) say about a model, known or not."""
        measured = probes.rows(), probes.log_latency(), probes.errors()
        population = self.beliefs.get(probes.device)
        if population is None:
            population = Population.without_members(physics(Lattice.over([]), *measured))
        return ModelEstimate(probes.name, population, measured, probes.graph())

    def save(self, path: Path) -> None:
        """Writes arrays and a JSON header (npz), whole or not at all."""
        header = {"version": VERSION, "summary": self.summary, "devices": list(self.beliefs)}
        arrays: dict[str, Any] = {"header": np.frombuffer(json.dumps(header).encode(), dtype=np.uint8)}
        for index, population in enumerate(self.beliefs.values()):
            for name, value in _arrays(population):
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
                beliefs = {device: _population(file, index) for index, device in enumerate(header["devices"])}
                return cls(beliefs, dict(header["summary"]))
        except FileNotFoundError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
            raise InvalidArtifact(f"{path} is no estimator, or a torn one ({error}): fit it again") from None


def _summary(samples: Sequence[ModelSamples]) -> dict[str, Any]:
    """What it was trained on: models and points by device, a digest of the measurements, and the versions that did it."""
    devices: dict[str, dict[str, Any]] = {}
    digest = hashlib.sha256()
    for model in samples:
        rows, log_latency = model.rows(), model.log_latency()
        of_device = devices.setdefault(model.device, {"models": [], "points": 0})
        of_device["models"].append(model.name)
        of_device["points"] += len(rows)
        digest.update(f"{model.device}\0{model.name}\0".encode() + rows.tobytes() + log_latency.tobytes())
    versions = {"python": platform.python_version(), "numpy": version("numpy"), "sluice": version("sluice")}
    return {"devices": devices, "dataset": digest.hexdigest(), "versions": versions}


def _arrays(population: Population) -> Iterable[tuple[str, Array]]:
    belief = population.belief
    yield from zip(("batch", "sm_percent", "quota_percent"), belief.lattice.axes, strict=True)
    yield "mean", belief.mean
    yield "covariance", belief.covariance
    yield from zip(("session_batch", "session_sm", "session_quota"), (belief.session.batch, belief.session.sm, belief.session.quota), strict=True)
    yield "spreads", np.array([belief.device_noise, belief.host_noise, belief.session.sd, belief.caution])
    yield "members", population.members
    yield "features", population.features


def _population(file: Any, index: int) -> Population:
    def array(name: str) -> Array:
        found = np.asarray(file[f"{index}.{name}"], dtype=np.float64)
        if not np.isfinite(found).all():
            raise ValueError(f"{name} holds values that are no numbers")
        return found

    def square(name: str, size: int) -> Array:
        return _shaped(array(name), name, (size, size))

    lattice = Lattice(array("batch"), array("sm_percent"), array("quota_percent"))
    device_noise, host_noise, session_sd, caution = array("spreads").tolist()
    nb, ns, nq = lattice.shape
    session = Session(session_sd, square("session_batch", nb), square("session_sm", ns), square("session_quota", nq))
    unknowns = parts(lattice)[-1].stop
    mean = _shaped(array("mean"), "mean", (unknowns,))
    belief = Belief(lattice, mean, square("covariance", unknowns), session, device_noise, host_noise, caution)
    members, features = array("members"), array("features")
    _shaped(members, "members", (len(members), unknowns))
    return Population(belief, members, _shaped(features, "features", (len(members), features.size // len(members))))


def _shaped(found: Array, name: str, shape: tuple[int, ...]) -> Array:
    if found.shape != shape:
        raise ValueError(f"{name} has the shape {found.shape}, not {shape}")
    return found
