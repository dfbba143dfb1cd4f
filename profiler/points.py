"""The table of measurements: a Parquet file, and beside it the journal of a sweep that is under way.

Owns the schema (`COLUMNS`), the file's metadata and its lock. A row is one visit to a configuration; `profiler.visits` makes points of them. A row is
durable once `Table.append` has returned: it is a line of the journal, which becomes part of the Parquet file when the table is closed, or opened
again after a kill. Measures nothing.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import math
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from contracts.errors import InvalidValue, Refused
from profiler.device import DeviceFacts

SCHEMA_VERSION = 1
_HEADER = b"sluice.points"


class Config(msgspec.Struct, frozen=True, order=True):
    """What is varied: rows of a batch, and the share."""

    batch: int
    sm_percent: int
    quota_percent: float


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """One visit to a configuration of a function; `COLUMNS` says what each field means."""

    function: str
    model_format: str
    model_source: str
    model_digest: str
    program_id: str
    device: str
    batch: int
    sm_percent: int
    quota_percent: float
    samples: int
    latency_mean_ms: float
    latency_p50_ms: float
    latency_p95_ms: float
    latency_p99_ms: float
    service_mean_ms: float
    service_p50_ms: float
    service_p95_ms: float
    service_p99_ms: float
    gpu_ms: float
    swap_ms: float
    device_bytes: int
    duration_s: float
    started_at: datetime.datetime
    beside_load: bool
    seed: int
    reference_ms: float = 0.0
    """Tables from before there were references lack it."""

    @property
    def config(self) -> Config:
        """Its place in the grid."""
        return Config(self.batch, self.sm_percent, self.quota_percent)


COLUMNS: Mapping[str, tuple[pa.DataType, str]] = {
    "function": (pa.string(), "namespace/name of the function"),
    "model_format": (pa.string(), "how the model's files are read"),
    "model_source": (pa.string(), "the model's URI, or its name in the catalogue"),
    "model_digest": (pa.string(), "digest of program, layout and weights"),
    "program_id": (pa.string(), "equal for models that differ only in their weights"),
    "device": (pa.string(), "the device's id; its facts are in the file's metadata"),
    "batch": (pa.int64(), "rows of a batch"),
    "sm_percent": (pa.int64(), "share of the SMs, in percent"),
    "quota_percent": (pa.float64(), "share of the time, in percent; the limit was the same, so nothing was borrowed"),
    "samples": (pa.int64(), "batches that the statistics are of"),
    "latency_mean_ms": (pa.float64(), "client-seen latency when the next batch is sent at the answer (one in flight) and the saved quota is used up"),
    "latency_p50_ms": (pa.float64(), "its median"),
    "latency_p95_ms": (pa.float64(), "its 95th percentile"),
    "latency_p99_ms": (pa.float64(), "its 99th percentile; below 100 samples hardly more than the greatest"),
    "service_mean_ms": (pa.float64(), "the same latency without the wait in the agent's queue: what a request meets after idle time"),
    "service_p50_ms": (pa.float64(), "its median"),
    "service_p95_ms": (pa.float64(), "its 95th percentile"),
    "service_p99_ms": (pa.float64(), "its 99th percentile"),
    "gpu_ms": (pa.float64(), "mean GPU time that a batch is charged: it takes gpu_ms * 100 / quota_percent of the time of its share"),
    "swap_ms": (pa.float64(), "what a cold answer takes longer than a warm one, at batch 1 and the whole device; measured once a sweep"),
    "device_bytes": (pa.int64(), "device memory of the weights"),
    "duration_s": (pa.float64(), "how long the point took to measure, warm-up included"),
    "started_at": (pa.timestamp("us", tz="UTC"), "when"),
    "beside_load": (pa.bool_(), "something else used the machine or the node meanwhile"),
    "seed": (pa.int64(), "of the sample inputs"),
    "reference_ms": (pa.float64(), "GPU time of one row on the whole device just before and after: the machine's speed then; 0: not measured"),
}
_SCHEMA = pa.schema([pa.field(name, kind, nullable=False, metadata={"doc": doc}) for name, (kind, doc) in COLUMNS.items()])


class Header(msgspec.Struct, frozen=True):
    """What is true of the whole file: facts of its devices by id, and the versions of what was measured."""

    devices: Mapping[str, DeviceFacts]
    versions: Mapping[str, str]
    schema: int = SCHEMA_VERSION


class Points(msgspec.Struct, frozen=True):
    """A table, read: a point for each visit."""

    header: Header
    points: tuple[Point, ...]

    @property
    def functions(self) -> tuple[str, ...]:
        """The functions, in the order in which they were first measured."""
        return tuple(dict.fromkeys(point.function for point in self.points))


def versions() -> dict[str, str]:
    """The versions that a measurement depends on."""
    found = {"python": platform.python_version()}
    for package in ("sluice", "torch"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def read(path: Path) -> Points:
    """All points of a table, those of a sweep under way or killed included; InvalidValue names what is wrong with the file."""
    # The journal first: what is compacted between the two readings is then found twice rather than never.
    journal = _read_journal(_journal(path))
    if journal is None and not path.exists():
        raise InvalidValue(f"{path}: there is no such table of measurements")
    parquet = _read_parquet(path) if path.exists() else None
    return _merged(path, [found for found in (parquet, journal) if found is not None])


class Table:
    """A table that one sweep at a time writes. `with Table(path, device, facts) as table: table.append(point)`."""

    def __init__(self, path: Path, device: str, facts: DeviceFacts) -> None:
        """Opens or makes it, and takes up what a killed sweep left.

        Refused when another sweep writes it; InvalidValue when it is torn, or holds measurements of other hardware under this device's id, or of
        other versions.
        """
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._fd = _lock(_journal(path), path)
        try:
            self.header, self._points = self._take_up(device, facts)
            self._compact()
        except BaseException:
            os.close(self._fd)
            raise

    def __enter__(self) -> Table:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def points(self) -> Sequence[Point]:
        """All points, in the order in which they were measured."""
        return self._points

    def append(self, point: Point) -> None:
        """Adds a point; it survives a kill, and the machine's end, once this returns."""
        _check(point, self.header, str(self.path))
        _write(self._fd, msgspec.json.encode(point) + b"\n")
        self._points.append(point)

    def close(self) -> None:
        """Makes the journal part of the Parquet file, and lets go of both."""
        if self._fd < 0:
            return
        try:
            self._compact()
            os.unlink(_journal(self.path))
        finally:
            os.close(self._fd)
            self._fd = -1

    def _take_up(self, device: str, facts: DeviceFacts) -> tuple[Header, list[Point]]:
        if not os.fstat(self._fd).st_size and not self.path.exists():
            return Header({device: facts}, versions()), []
        parts = [_read_journal(_journal(self.path)), _read_parquet(self.path) if self.path.exists() else None]
        old = _merged(self.path, [part for part in reversed(parts) if part is not None])
        if old.header.versions != versions():
            raise InvalidValue(f"{self.path} was measured with {_words(old.header.versions)}, this is {_words(versions())}: name another file")
        known = old.header.devices.get(device, facts)
        if (known.kind, known.name, known.processors) != (facts.kind, facts.name, facts.processors):
            raise InvalidValue(
                f"{self.path} holds measurements of {device} on {known.name} with {known.processors} processors, "
                f"this is {facts.name} with {facts.processors}: name another file"
            )
        return Header({**old.header.devices, device: known}, old.header.versions), list(old.points)

    def _compact(self) -> None:
        """Parquet file whole and durable first, journal emptied to its header then."""
        if self._points:
            rows = [{name: getattr(point, name) for name in COLUMNS} for point in self._points]
            table = pa.Table.from_pylist(rows, _SCHEMA.with_metadata({_HEADER: msgspec.json.encode(self.header)}))
            temporary = self.path.with_name(f"{self.path.name}.new")
            pq.write_table(table, temporary)
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, self.path)
        os.ftruncate(self._fd, 0)
        _write(self._fd, msgspec.json.encode(self.header) + b"\n")
        folder = os.open(self.path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def _journal(path: Path) -> Path:
    return path.with_name(f"{path.name}.journal")


def _lock(journal: Path, path: Path) -> int:
    """The journal, held by this process alone; the lock dies with it."""
    while True:
        fd = os.open(journal, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.stat(journal).st_ino == os.fstat(fd).st_ino:
                return fd
        except BlockingIOError:
            os.close(fd)
            raise Refused(f"another sweep writes {path}: wait for its end, or name another file") from None
        except FileNotFoundError:
            pass
        os.close(fd)  # Its last owner removed it between the two calls.


def _write(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]
    os.fsync(fd)


def _read_journal(path: Path) -> Points | None:
    """The journal's points; None when there is none. Its last line may be cut short: what was being written then was never acknowledged."""
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return None
    if not lines:
        return None
    try:
        return _checked(Points(msgspec.json.decode(lines[0], type=Header), tuple(_decode_lines(lines[1:], path))), path)
    except msgspec.MsgspecError as error:
        raise InvalidValue(f"{path} is no journal of a sweep: its first line says {error}") from None


def _decode_lines(lines: Sequence[bytes], path: Path) -> Iterator[Point]:
    for number, line in enumerate(lines, 2):
        try:
            yield msgspec.json.decode(line, type=Point)
        except msgspec.MsgspecError as error:
            raise InvalidValue(f"{path} is damaged in line {number}: {error}") from None


def _read_parquet(path: Path) -> Points:
    if not path.stat().st_size:
        raise InvalidValue(f"{path} is no table of measurements: it is empty")
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise InvalidValue(f"{path} is no table of measurements, or torn: {error}") from None
    try:
        header = msgspec.json.decode((table.schema.metadata or {}).get(_HEADER, b""), type=Header)
    except msgspec.MsgspecError:
        raise InvalidValue(f"{path} is a Parquet file, but no table of measurements: its metadata lacks {_HEADER.decode()}") from None
    _check_schema(header, path)
    try:
        points = tuple(msgspec.convert(row, Point) for row in table.to_pylist())
    except msgspec.ValidationError as error:
        raise InvalidValue(f"{path} does not fit the schema: {error}") from None
    return _checked(Points(header, points), path)


def _check_schema(header: Header, path: Path) -> None:
    if header.schema != SCHEMA_VERSION:
        raise InvalidValue(f"{path} has schema version {header.schema}, this Sluice reads {SCHEMA_VERSION}")


def _checked(found: Points, path: Path) -> Points:
    _check_schema(found.header, path)
    for point in found.points:
        _check(point, found.header, str(path))
    return found


def _check(point: Point, header: Header, path: str) -> None:
    if point.device not in header.devices:
        raise InvalidValue(f"{path}: a point of {point.function} is of an unknown device {point.device!r} (known: {', '.join(header.devices)})")
    if point.batch < 1 or not 1 <= point.sm_percent <= 100 or not 0 < point.quota_percent <= 100:
        raise InvalidValue(f"{path}: a point of {point.function} has an impossible share: {point.config}")
    for name in ("latency_mean_ms", "latency_p50_ms", "latency_p95_ms", "latency_p99_ms", "service_mean_ms", "gpu_ms"):
        value = getattr(point, name)
        if not (value > 0 and math.isfinite(value)):
            raise InvalidValue(f"{path}: a point of {point.function} must have a {name} greater than 0, got {value}")
    if not (point.reference_ms >= 0 and math.isfinite(point.reference_ms)):
        raise InvalidValue(f"{path}: a point of {point.function} must have a reference_ms of 0 or more, got {point.reference_ms}")


def _merged(path: Path, parts: Sequence[Points]) -> Points:
    """Parts of one table as one; a point that stands in both counts once."""
    if not parts:
        raise InvalidValue(f"{path} is no table of measurements: it is empty")
    devices = {name: facts for part in reversed(parts) for name, facts in part.header.devices.items()}
    points = dict.fromkeys(point for part in parts for point in part.points)
    return Points(Header(devices, parts[0].header.versions), tuple(points))


def _words(found: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in found.items())
