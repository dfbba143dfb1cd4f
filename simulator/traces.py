"""Public traces as Arrivals. The format is told by the header, so a user's own download of any of them loads as it is, gzipped or not.

Azure Functions 2019 (calls a minute) and 2021 (each call), Azure LLM 2023 and 2024, BurstGPT, Alibaba's image generation of 2024, HAS-GPU's stages.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv

from contracts.errors import InvalidArtifact
from contracts.units import S
from simulator.arrivals import Arrivals, of_counts, of_many

_MINUTE_NS = 60 * S
Column = npt.NDArray[Any]


def read(path: Path, chance: np.random.Generator) -> Arrivals:
    """The trace in a file; what it leaves open (when in its minute a call comes) is drawn by chance. InvalidArtifact names the file."""
    try:
        if path.name.removesuffix(".gz").endswith(".json"):
            return _stages(msgspec.json.decode(path.read_bytes(), type=dict[str, _Stages]), chance)
        table = csv.read_csv(path)
        if not len(table):
            raise InvalidArtifact("has no requests", key="trace", value=str(path))
        return _reader(table, path)(table, path.name.partition(".")[0], chance)
    except (OSError, pa.ArrowException, msgspec.MsgspecError, ValueError) as error:
        raise InvalidArtifact(f"cannot be read as a trace ({type(error).__name__}: {error})", key="trace", value=str(path)) from None


def _reader(table: pa.Table, path: Path) -> Callable[[pa.Table, str, np.random.Generator], Arrivals]:
    columns = set(table.column_names)
    for needed, reader in _READERS.items():
        if set(needed) <= columns:
            return reader
    known = "; ".join(", ".join(needed) for needed in _READERS)
    raise InvalidArtifact(f"has columns of no known trace, found {', '.join(table.column_names[:8])} (known: {known})", key="trace", value=str(path))


def _azure_2021(table: pa.Table, _: str, __: np.random.Generator) -> Arrivals:
    names = pc.binary_join_element_wise(table["app"], table["func"], "/")
    return _grouped(names, (_numbers(table, "end_timestamp") - _numbers(table, "duration")) * S)


def _azure_2019(table: pa.Table, _: str, chance: np.random.Generator) -> Arrivals:
    minutes = [name for name in table.column_names if name.isdecimal()]
    counts = np.stack([_numbers(table, name) for name in minutes], axis=1).astype(np.int64)
    names = pc.binary_join_element_wise(table["HashApp"], table["HashFunction"], "/").to_pylist()
    starts = (np.array([int(minute) for minute in minutes]) - 1) * _MINUTE_NS
    return of_counts(names, starts, _MINUTE_NS, counts, chance)


def _azure_llm(table: pa.Table, name: str, _: np.random.Generator) -> Arrivals:
    stamps = table["TIMESTAMP"]
    if not pa.types.is_timestamp(stamps.type):
        stamps = pc.cast(stamps, pa.timestamp("ns"))
    at_ns = pc.cast(stamps, pa.timestamp("ns")).to_numpy().astype(np.int64)
    return _grouped(pa.array([name] * len(table)), at_ns)


def _burstgpt(table: pa.Table, _: str, __: np.random.Generator) -> Arrivals:
    return _grouped(table["Model"], _numbers(table, "Timestamp") * S)


def _alibaba(table: pa.Table, _: str, __: np.random.Generator) -> Arrivals:
    return _grouped(table["model"], _numbers(table, "arrival_s") * S)


class _Stages(msgspec.Struct):
    stage_s: int
    requests_per_stage: list[int]


def _stages(document: Mapping[str, _Stages], chance: np.random.Generator) -> Arrivals:
    """HAS-GPU's loads: requests in each stage of a few seconds, under one name each."""
    at_ns: list[npt.NDArray[np.int64]] = []
    span_ns = 0
    for load in document.values():
        stage_ns, counts = load.stage_s * S, np.array(load.requests_per_stage, np.int64)
        at_ns.append(np.repeat(np.arange(len(counts)) * stage_ns, counts) + chance.integers(0, stage_ns, counts.sum()))
        span_ns = max(span_ns, len(counts) * stage_ns)
    return of_many(tuple(document), at_ns, span_ns)


_READERS: Mapping[tuple[str, ...], Callable[[pa.Table, str, np.random.Generator], Arrivals]] = {
    ("app", "func", "end_timestamp", "duration"): _azure_2021,
    ("HashApp", "HashFunction", "1", "2"): _azure_2019,
    ("TIMESTAMP", "ContextTokens"): _azure_llm,
    ("Timestamp", "Model", "Request tokens"): _burstgpt,
    ("arrival_s", "model"): _alibaba,
}


def _numbers(table: pa.Table, column: str) -> Column:
    values: Column = table[column].to_numpy().astype(np.float64)
    if not np.isfinite(values).all() or (values < 0).any():
        raise ValueError(f"column {column!r} holds values that are no times or counts")
    return values


def _grouped(names: pa.Array | pa.ChunkedArray, at_ns: Column) -> Arrivals:
    """From one row a request; time starts with the first."""
    encoded = pc.dictionary_encode(names)
    encoded = encoded.combine_chunks() if isinstance(encoded, pa.ChunkedArray) else encoded
    at = np.asarray(at_ns, np.float64 if at_ns.dtype.kind == "f" else np.int64)
    at = (at - at.min()).astype(np.int64)
    order = np.argsort(at, kind="stable")
    function = encoded.indices.to_numpy().astype(np.int32)[order]
    return Arrivals(tuple(encoded.dictionary.to_pylist()), at[order], function, int(at.max()) + 1)
