"""The table of measurements: what is appended survives a kill, what is torn or foreign is named, and one sweep at a time writes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pyarrow.parquet as pq
import pytest

from contracts.errors import InvalidValue, Refused
from profiler import points
from profiler.device import DeviceFacts
from profiler.points import COLUMNS, Config, Point, Table, read

ROOT = Path(__file__).parents[2]
FACTS = DeviceFacts("cpu", "a processor", 2, 2500.0, 1e11, 2e10, 1e10, 1 << 30)
WRITER = """
import sys
from pathlib import Path
from tests.profiler.test_points import FACTS, point
from profiler.points import Table
table = Table(Path(sys.argv[1]), "cpu:0", FACTS)
for batch in (1, 2, 3):
    table.append(point(batch=batch))
print("written", flush=True)
sys.stdin.read()
"""


def point(**changes: object) -> Point:
    fields = {
        "function": "default/a",
        "model_format": "sluice-catalog",
        "model_source": "mlp?width=8",
        "model_digest": "d" * 64,
        "program_id": "catalog:mlp:{}",
        "device": "cpu:0",
        "batch": 1,
        "sm_percent": 50,
        "quota_percent": 12.5,
        "samples": 100,
        "latency_mean_ms": 80.0,
        "latency_p50_ms": 79.0,
        "latency_p95_ms": 90.0,
        "latency_p99_ms": 99.0,
        "service_mean_ms": 10.5,
        "service_p50_ms": 10.0,
        "service_p95_ms": 11.0,
        "service_p99_ms": 12.0,
        "gpu_ms": 10.0,
        "swap_ms": 3.0,
        "device_bytes": 1 << 20,
        "duration_s": 8.0,
        "started_at": datetime(2026, 1, 2, 3, 4, 5, 678, tzinfo=UTC),
        "beside_load": False,
        "seed": 1,
    }
    return Point(**{**fields, **changes})  # type: ignore[arg-type]


def written(path: Path, *found: Point) -> Path:
    with Table(path, "cpu:0", FACTS) as table:
        for each in found:
            table.append(each)
    return path


def test_every_field_of_a_point_is_a_column_with_its_meaning_in_the_file(tmp_path: Path) -> None:
    schema = pq.read_schema(written(tmp_path / "t.parquet", point()))
    assert schema.names == list(COLUMNS) == list(Point.__struct_fields__)
    assert all(schema.field(name).metadata[b"doc"] for name in schema.names)


def test_points_come_back_as_they_were_with_facts_and_versions(tmp_path: Path) -> None:
    wanted = (point(), point(batch=2, beside_load=True), point(function="default/b"))
    found = read(written(tmp_path / "t.parquet", *wanted))
    assert found.points == wanted
    assert found.header.devices == {"cpu:0": FACTS}
    assert found.header.versions == points.versions()
    assert found.functions == ("default/a", "default/b")
    assert found.points[0].config == Config(1, 50, 12.5)


def test_a_finished_sweep_leaves_one_file_and_a_second_adds_to_it(tmp_path: Path) -> None:
    path = written(tmp_path / "t.parquet", point())
    written(path, point(batch=2))
    assert [each.batch for each in read(path).points] == [1, 2]
    assert os.listdir(tmp_path) == ["t.parquet"]


def test_a_sweep_that_measured_nothing_leaves_nothing(tmp_path: Path) -> None:
    path = written(tmp_path / "t.parquet")
    assert os.listdir(tmp_path) == []
    with pytest.raises(InvalidValue, match="there is no such table"):
        read(path)


def test_a_killed_sweep_loses_nothing_that_was_measured(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "written\n"
        assert [each.batch for each in read(path).points] == [1, 2, 3], "a table can be read while it is written"
        with pytest.raises(Refused, match=r"another sweep writes .*t\.parquet"):
            Table(path, "cpu:0", FACTS)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdin.close()
        process.stdout.close()
    assert [each.batch for each in read(path).points] == [1, 2, 3]
    with Table(path, "cpu:0", FACTS) as table:
        assert [each.batch for each in table.points] == [1, 2, 3]
        table.append(point(batch=4))
    assert [each.batch for each in read(path).points] == [1, 2, 3, 4]


def test_a_line_that_was_being_written_when_the_machine_ended_is_no_point(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    table = Table(path, "cpu:0", FACTS)
    table.append(point())
    journal = tmp_path / "t.parquet.journal"
    whole = journal.read_bytes()
    table.close()
    path.unlink()
    journal.write_bytes(whole + msgspec.json.encode(point(batch=2))[:-20])
    assert [each.batch for each in read(path).points] == [1]
    written(path, point(batch=3))
    assert [each.batch for each in read(path).points] == [1, 3]


def test_a_crash_between_the_two_files_counts_no_point_twice(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    table = Table(path, "cpu:0", FACTS)
    table.append(point())
    journal = (tmp_path / "t.parquet.journal").read_bytes()
    table.close()
    (tmp_path / "t.parquet.journal").write_bytes(journal)
    assert len(read(path).points) == 1
    written(path)
    assert len(read(path).points) == 1


def test_tables_from_before_there_were_references_are_read_and_added_to(tmp_path: Path) -> None:
    path = written(tmp_path / "t.parquet", point())
    pq.write_table(pq.read_table(path).drop_columns(["reference_ms"]), path)
    journal = (
        msgspec.json.encode(row).replace(b',"reference_ms":0.0', b"") for row in (points.Header({"cpu:0": FACTS}, points.versions()), point(batch=2))
    )
    path.with_name("t.parquet.journal").write_bytes(b"".join(line + b"\n" for line in journal))
    assert read(path).points == (point(), point(batch=2))
    written(path, point(batch=3, reference_ms=5.0))
    assert [row.reference_ms for row in read(path).points] == [0, 0, 5]


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _foreign(path: Path) -> None:
    table = pq.read_table(path)
    pq.write_table(table.replace_schema_metadata({}), path)


def _lacks_a_column(path: Path) -> None:
    pq.write_table(pq.read_table(path).drop_columns(["gpu_ms"]), path)


def _version(path: Path) -> None:
    table = pq.read_table(path)
    header = table.schema.metadata[b"sluice.points"].replace(b'"schema":1', b'"schema":99')
    pq.write_table(table.replace_schema_metadata({b"sluice.points": header}), path)


def _device(path: Path) -> None:
    table = pq.read_table(path)
    header = table.schema.metadata[b"sluice.points"].replace(b"cpu:0", b"cpu:7")
    pq.write_table(table.replace_schema_metadata({b"sluice.points": header}), path)


BROKEN = {
    "an empty file": (lambda path: path.write_bytes(b""), "is empty"),
    "a torn file": (_truncate, "or torn"),
    "text": (lambda path: path.write_text("batch,sm\n1,2\n"), "is no table of measurements"),
    "a Parquet file of something else": (_foreign, "metadata lacks sluice.points"),
    "a missing column": (_lacks_a_column, "gpu_ms"),
    "another schema version": (_version, "schema version 99, this Sluice reads 1"),
    "a point of an unknown device": (_device, r"unknown device 'cpu:0' \(known: cpu:7\)"),
    "a journal damaged in the middle": (
        lambda path: path.with_name("t.parquet.journal").write_bytes(
            msgspec.json.encode(points.Header({"cpu:0": FACTS}, {})) + b"\n{]\n" + msgspec.json.encode(point()) + b"\n"
        ),
        "damaged in line 2",
    ),
}


@pytest.mark.parametrize(("spoil", "message"), BROKEN.values(), ids=BROKEN)
def test_what_cannot_be_read_is_named_and_left_as_it_is(tmp_path: Path, spoil, message: str) -> None:  # type: ignore[no-untyped-def]
    path = written(tmp_path / "t.parquet", point())
    spoil(path)
    before = path.read_bytes()
    with pytest.raises(InvalidValue, match=message) as caught:
        read(path)
    assert "t.parquet" in str(caught.value)
    with pytest.raises(InvalidValue, match=message):
        Table(path, "cpu:0", FACTS)
    assert path.read_bytes() == before


WRONG = {
    "no latency": ({"latency_mean_ms": 0.0}, "latency_mean_ms greater than 0"),
    "a latency that is no number": ({"latency_p99_ms": float("nan")}, "latency_p99_ms greater than 0"),
    "a negative time": ({"gpu_ms": -1.0}, "gpu_ms greater than 0"),
    "no rows": ({"batch": 0}, "impossible share"),
    "more than all SMs": ({"sm_percent": 101}, "impossible share"),
    "a reference that is no number": ({"reference_ms": float("inf")}, "reference_ms of 0 or more"),
    "another device": ({"device": "cpu:1"}, "unknown device 'cpu:1'"),
}


@pytest.mark.parametrize(("changes", "message"), WRONG.values(), ids=WRONG)
def test_an_impossible_point_is_never_written(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with Table(tmp_path / "t.parquet", "cpu:0", FACTS) as table:
        table.append(point())
        with pytest.raises(InvalidValue, match=message):
            table.append(point(**changes))
    assert read(tmp_path / "t.parquet").points == (point(),)


def test_another_processor_under_the_same_name_is_refused_and_another_device_is_added(tmp_path: Path) -> None:
    path = written(tmp_path / "t.parquet", point())
    other = msgspec.structs.replace(FACTS, name="another processor")
    with pytest.raises(InvalidValue, match="a processor with 2 processors, this is another processor with 2: name another file"):
        Table(path, "cpu:0", other)
    with Table(path, "cpu:1", other) as table:
        table.append(point(device="cpu:1"))
    assert set(read(path).header.devices) == {"cpu:0", "cpu:1"}


def test_other_versions_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "t.parquet", point())
    monkeypatch.setattr(points, "versions", lambda: {"sluice": "9"})
    with pytest.raises(InvalidValue, match="this is sluice 9: name another file"):
        Table(path, "cpu:0", FACTS)
