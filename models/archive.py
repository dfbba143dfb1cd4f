"""Reads the zip archives in which torch keeps models, as plain records.

Owns the defence against foreign archives: records are stored, never compressed (no bombs), unique, inside one folder, and checked by their CRC. It
never unpickles anything and never writes a file.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

from contracts.errors import InvalidArtifact, SluiceError


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns whatever a reader of `path` raises into InvalidArtifact that names the file."""
    try:
        yield
    except InvalidArtifact as error:
        if str(path) in error.message:
            raise
        raise InvalidArtifact(f"cannot be served ({error.message})", key="model", value=str(path)) from error
    except SluiceError:
        raise
    except (Exception, RecursionError) as error:
        detail = " ".join(str(error).split())[:200]
        raise InvalidArtifact(f"cannot be read as a model ({type(error).__name__}: {detail})", key="model", value=str(path)) from error


def locate(source: str) -> Path:
    """The path of a `file://` URI or of a plain absolute path; InvalidArtifact for anything else."""
    if source.startswith("/"):
        return Path(source)
    parts = urlsplit(source)
    if parts.scheme != "file" or parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
        raise InvalidArtifact("must be a file:// URI or an absolute path", key="storageUri", value=source)
    return Path(unquote(parts.path))


class Archive:
    """The records of one archive, by their path below its single folder."""

    def __init__(self, path: Path) -> None:
        with reading(path):
            self._zip = zipfile.ZipFile(path)
            self._records = self._audit(path)

    def _audit(self, path: Path) -> dict[str, zipfile.ZipInfo]:
        infos = [info for info in self._zip.infolist() if not info.is_dir()]
        folders = {info.filename.partition("/")[0] for info in infos}
        records = {info.filename.partition("/")[2]: info for info in infos}
        if len(folders) != 1 or len(records) != len(infos) or "" in records:
            raise InvalidArtifact("is no archive of one model", key="model", value=str(path))
        if any(info.compress_type != zipfile.ZIP_STORED for info in infos) or sum(info.file_size for info in infos) > os.path.getsize(path):
            raise InvalidArtifact("is an archive with compressed or overlapping records, which torch never writes", key="model", value=str(path))
        return records

    def names(self) -> list[str]:
        """The records there are."""
        return list(self._records)

    def size(self, name: str) -> int:
        """A record's bytes; KeyError if there is none."""
        return self._records[name].file_size

    def read(self, name: str) -> bytes:
        """A record, checked by its CRC; KeyError if there is none."""
        return self._zip.read(self._records[name])

    def read_into(self, name: str, buffer: memoryview) -> None:
        """Fills `buffer`, of the record's size, with the record."""
        with self._zip.open(self._records[name]) as record:
            done = 0
            while got := record.readinto(buffer[done:]):  # type: ignore[attr-defined]
                done += got
        if done != len(buffer):
            raise EOFError(f"the record {name} ends after {done} of {len(buffer)} bytes")

    def close(self) -> None:
        """Closes the file."""
        self._zip.close()
