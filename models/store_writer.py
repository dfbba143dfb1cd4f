"""Writes a loaded model into the host weight store, whole or not at all.

Owns the recording of layouts (once for each program) and the order of the files: program, tokenizer, weights, index, reference. Never leaves
anything behind when it fails, and reserves room before it writes, so that a full store is an error and not a SIGBUS.
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import msgspec
import torch
from blake3 import blake3
from torch import Tensor

from contracts.artifact import WeightIndex
from contracts.errors import InvalidArtifact, Unavailable
from contracts.units import format_bytes
from models import huge
from models import store as files
from models.layout import Layout, record
from models.load import Loaded
from models.script import ScriptProgram
from models.threads import THREADS, at_once

_PIECE_BYTES = 8 << 20
_layouts: dict[str, Layout] = {}


def write(loaded: Loaded, store: Path, limit_bytes: int) -> WeightIndex:
    """The model in the store, written now or found there by its digest.

    Unavailable, naming sizes, when its files would take more than `limit_bytes` or than the file system has.
    """
    layout = _layout(loaded)
    needed = layout.total_bytes + len(loaded.payload) + 2 * len(loaded.tokenizer)  # the agent keeps a sealed copy for the predictors
    if needed > limit_bytes:
        raise Unavailable(f"the model takes {format_bytes(needed)} of host memory, {format_bytes(max(0, limit_bytes))} are left of the budget")
    index = WeightIndex("", layout.total_bytes, layout.tensors, layout.gates, loaded.program, loaded.signature, layout.run_ns)
    with _undo(needed) as made:
        temporary, digest = _write_weights(loaded.executable.weights(), index, store, made)
        if not _is_whole(store, digest):
            if loaded.payload:
                _place(store / loaded.program.source, loaded.payload, made)
            if loaded.signature.text is not None:
                _place(store / loaded.signature.text.tokenizer, loaded.tokenizer, made)
            _rename(temporary, store / f"{digest}.weights", made)
            _place(store / f"{digest}.json", msgspec.json.encode(msgspec.structs.replace(index, digest=digest)), made)
        found = files.read_index(store, digest)
        made[:] = [path for path in made if path == temporary]
    return found


def remember(store: Path, name: str, digest: str) -> None:
    """Notes under `name` (see `store.ref_name`) which digest a reference has."""
    with _undo(len(digest)) as made:
        _place(store / name, digest.encode(), made)
        made.clear()


@contextmanager
def _undo(needed: int) -> Iterator[list[Path]]:
    """A list of files to remove at the end, which success empties; a store that is full or cannot be written becomes Unavailable."""
    made: list[Path] = []
    try:
        yield made
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise Unavailable(f"the host store has no room for {format_bytes(needed)} ({error.strerror})") from error
        raise Unavailable(f"the host store cannot be written ({error})") from error
    finally:
        for path in made:
            path.unlink(missing_ok=True)


def _layout(loaded: Loaded) -> Layout:
    """The layout of a program, recorded the first time it is met."""
    key = msgspec.json.encode(loaded.program).decode()
    if key not in _layouts:
        inputs = loaded.sample()
        weights = loaded.executable.weights()
        _layouts[key] = record(loaded.module, weights, lambda: loaded.run(inputs), opaque=isinstance(loaded.module, ScriptProgram))
    return _layouts[key]


def _is_whole(store: Path, digest: str) -> bool:
    """Whether the store holds this digest undamaged."""
    try:
        files.verify(store, digest)
    except (InvalidArtifact, OSError):
        return False
    return True


def _write_weights(weights: Mapping[str, Tensor], index: WeightIndex, store: Path, made: list[Path]) -> tuple[Path, str]:
    """A temporary file with the weights in their places, and the digest."""
    temporary = _temporary(store, made)
    hasher = blake3(max_threads=THREADS)
    with open(temporary, "r+b", buffering=0) as file, at_once() as start:
        huge.allocate(file.fileno(), index.total_bytes)
        end = 0
        for entry in index.tensors:
            content = memoryview(weights[entry.name].contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
            if len(content) != entry.nbytes:
                raise InvalidArtifact("has another size than in the run that was recorded", key=entry.name, value=len(content))
            for begin in range(0, len(content), _PIECE_BYTES):
                start(_write_all, file.fileno(), content[begin : begin + _PIECE_BYTES], entry.offset + begin)
            hasher.update(bytes(entry.offset - end))
            hasher.update(content)
            end = entry.offset + entry.nbytes
        hasher.update(bytes(index.total_bytes - end))
    return temporary, hasher.update(files.identity(index)).hexdigest()


def _write_all(fd: int, content: memoryview, offset: int) -> None:
    while content:
        written = os.pwrite(fd, content, offset)
        content, offset = content[written:], offset + written


def _temporary(store: Path, made: list[Path]) -> Path:
    fd, name = tempfile.mkstemp(prefix=files.TEMPORARY, dir=store)
    os.close(fd)
    made.append(Path(name))
    return made[-1]


def _place(path: Path, content: bytes, made: list[Path]) -> None:
    """Writes a small file under a temporary name and renames it. A file that has this content already stays, whatever fails later."""
    if path.is_file() and path.read_bytes() == content:
        return
    temporary = _temporary(path.parent, made)
    with open(temporary, "r+b", buffering=0) as file:
        os.posix_fallocate(file.fileno(), 0, len(content))
        _write_all(file.fileno(), memoryview(content), 0)
    _rename(temporary, path, made)


def _rename(temporary: Path, path: Path, made: list[Path]) -> None:
    temporary.rename(path)
    made.remove(temporary)
    made.append(path)
