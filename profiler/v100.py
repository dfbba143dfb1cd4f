"""The published measurements of HAS-GPU's authors (60 torchvision models on a V100) as the estimator's samples. Reads files, decides nothing."""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from contracts.errors import InvalidValue
from profiler.estimator import ModelSamples
from profiler.features import features_of_v100_graph

DEVICE = "v100"
_COLUMNS = ("batch", "sm_percent", "quota_percent", "latency_ms")


def read(folder: Path) -> list[ModelSamples]:
    """All models of `latency.csv.gz` with the features of `graphs.jsonl.gz`, by name; InvalidValue names a file that is missing or torn."""
    found: dict[str, list[list[float]]] = {}
    latency = folder / "latency.csv.gz"
    with _readable(latency), gzip.open(latency, "rt", encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            found.setdefault(row["model"], []).append([float(row[name]) for name in _COLUMNS])
    if not found:
        raise InvalidValue("holds no measurements", key=str(latency), value=0)
    graphs = folder / "graphs.jsonl.gz"
    with _readable(graphs), gzip.open(graphs, "rt", encoding="utf-8") as file:
        vectors = {record["model"]: features_of_v100_graph(record).vector() for record in map(json.loads, file)}
    samples = []
    for name in sorted(found):
        batch, sm, quota, latency_ms = (list(column) for column in zip(*found[name], strict=True))
        samples.append(ModelSamples(name, DEVICE, batch, sm, quota, latency_ms, features=vectors.get(name)))
    return samples


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError, msgspec.MsgspecError) as error:
        raise InvalidValue(f"cannot be read as the published V100 data ({type(error).__name__}: {error})", key=str(path), value=path.name) from None
