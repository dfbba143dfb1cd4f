"""The host weight store: one folder in shared memory that holds each model's weights once for the whole node, and outlives the agent.

Owns the folder, its budget in bytes, and who refers to which model; `models.store` says what lies in it. A restarted agent adopts what it finds
without the loader, each model once its bytes were read again and match their digest. What is torn, damaged or unknown is removed. Never reads a model
file and writes nothing: the loader does both.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import shutil
from pathlib import Path

from blake3 import blake3

from contracts.artifact import Text, WeightIndex
from contracts.errors import InvalidArtifact, Unavailable
from contracts.functions import ModelRef
from models.store import identity, read_index, ref_name
from models.store import tokenizer as read_tokenizer

_log = logging.getLogger(__name__)
_READ_BYTES = 8 << 20


def store_folder(run_dir: Path) -> Path:
    """Where the store of a run dir lies, unless the command line says otherwise."""
    return Path("/dev/shm") / f"sluice-{os.getuid()}-{blake3(os.fsencode(run_dir)).hexdigest(length=4)}"


class Stored:
    """One model in the store. `fd` is its weight file; `refs` counts the functions that use it; `verified` once its bytes matched the digest.

    `tokenizer_fd` is a sealed copy of its tokenizer, since predictors are not to be trusted with the file; -1 for a model that takes no text.
    """

    __slots__ = ("fd", "index", "index_json", "nbytes", "refs", "tokenizer_fd", "verified")

    def __init__(self, index: WeightIndex, index_json: bytes, fd: int, tokenizer_fd: int) -> None:
        self.index = index
        self.index_json = index_json
        self.fd = fd
        self.tokenizer_fd = tokenizer_fd
        self.nbytes = index.total_bytes + len(index_json)
        self.refs = 0
        self.verified = False

    def close(self) -> None:
        """Closes its descriptors."""
        for fd in (self.fd, self.tokenizer_fd):
            if fd >= 0:
                os.close(fd)
        self.fd = self.tokenizer_fd = -1


class HostStore:
    """All models of the node by digest. Unavailable from the constructor when the folder cannot be used."""

    def __init__(self, folder: Path, budget_bytes: int) -> None:
        self.folder = folder
        self.budget_bytes = budget_bytes
        self._models: dict[str, Stored] = {}
        self._shared: dict[str, int] = {}
        """What models may have in common, programs and tokenizers, by file name: the bytes that they take."""
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if folder.stat().st_uid != os.geteuid():
                raise PermissionError(f"it belongs to user {folder.stat().st_uid}")
            folder.chmod(0o700)
        except OSError as error:
            raise Unavailable(f"the host store {folder} cannot be used: {error}") from None
        for path in sorted(folder.glob("*.json")):
            with contextlib.suppress(InvalidArtifact):
                self._open(path.stem)
        self.sweep()

    @property
    def used_bytes(self) -> int:
        """What all models take, those included that no function uses yet."""
        return sum(stored.nbytes for stored in self._models.values()) + sum(self._shared.values())

    @property
    def room_bytes(self) -> int:
        """What one more model may take."""
        return max(0, self.budget_bytes - self.used_bytes)

    async def find(self, ref: ModelRef) -> Stored | None:
        """Acquires the model of a reference, if it is here, its source unchanged and its bytes intact; InvalidArtifact as the loader raises."""
        stored = self._models.get(_text(self.folder / ref_name(ref)))
        if stored is None:
            return None
        stored.refs += 1
        if stored.verified or await self.intact(stored):
            return stored
        _log.warning("the stored weights of %s are damaged and are removed", ref.source)
        self.discard(stored)
        self.release(stored)
        return None

    def add(self, digest: str) -> Stored:
        """Acquires what the loader has just written; InvalidArtifact if it is not there or not whole."""
        stored = self._models.get(digest) or self._open(digest)
        stored.verified = True
        stored.refs += 1
        return stored

    async def intact(self, stored: Stored) -> bool:
        """Whether the file still holds the bytes that its digest names; read in a thread."""
        fd = os.dup(stored.fd)
        try:
            stored.verified = await asyncio.get_running_loop().run_in_executor(None, _matches, fd, stored.index)
        finally:
            os.close(fd)
        return stored.verified

    def release(self, stored: Stored) -> None:
        """One function less uses the model; with the last it goes."""
        stored.refs -= 1
        if not stored.refs:
            self.discard(stored)

    def discard(self, stored: Stored) -> None:
        """Forgets a model, whose files the next `sweep` removes; functions that use it keep what they mapped until they release it."""
        if self._models.get(stored.index.digest) is stored:
            del self._models[stored.index.digest]
        if not stored.refs:
            stored.close()

    def drop_unclaimed(self) -> bool:
        """Forgets the models that no function uses; True if there were any."""
        unclaimed = [stored for stored in self._models.values() if not stored.refs]
        for stored in unclaimed:
            self.discard(stored)
        return bool(unclaimed)

    def sweep(self) -> None:
        """Removes every file that no known model needs: what a killed loader or agent left. Not while the loader writes."""
        shared = {name for stored in self._models.values() for name in _shared(stored.index)}
        self._shared = {name: nbytes for name, nbytes in self._shared.items() if name in shared}
        needed = {f"{digest}.{kind}" for digest in self._models for kind in ("weights", "json")} | shared
        for path in self.folder.iterdir():
            if path.name not in needed and not (path.suffix == ".ref" and _text(path) in self._models):
                with contextlib.suppress(OSError):
                    path.unlink()

    def close(self, *, remove: bool) -> None:
        """Lets go of the files, and deletes them if nobody is to adopt them; an empty folder goes in any case."""
        for stored in self._models.values():
            stored.close()
        if remove:
            shutil.rmtree(self.folder, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                self.folder.rmdir()

    def _open(self, digest: str) -> Stored:
        index = read_index(self.folder, digest)
        try:
            index_json = (self.folder / f"{digest}.json").read_bytes()
            sizes = {name: (self.folder / name).stat().st_size for name in _shared(index)}
            fd = os.open(self.folder / f"{digest}.weights", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as error:
            raise InvalidArtifact(f"cannot be opened ({error.strerror})", key="digest", value=digest) from None
        try:
            tokenizer_fd = self._tokenizer(index.signature.text)
        except InvalidArtifact:
            os.close(fd)
            raise
        if index.signature.text is not None:
            sizes[index.signature.text.tokenizer] *= 2
        self._shared |= sizes
        stored = self._models[digest] = Stored(index, index_json, fd, tokenizer_fd)
        return stored

    def _tokenizer(self, text: Text | None) -> int:
        """A sealed copy of a tokenizer, one for all models that have it; -1 without one."""
        if text is None:
            return -1
        for stored in self._models.values():
            if stored.index.signature.text is not None and stored.index.signature.text.tokenizer == text.tokenizer:
                return os.dup(stored.tokenizer_fd)
        return sealed(read_tokenizer(self.folder, text))


def sealed(content: bytes) -> int:
    """A memfd that holds `content` and can never change."""
    fd = os.memfd_create("sluice-tokenizer", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        with open(fd, "wb", buffering=0, closefd=False) as file:
            file.write(content)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    except OSError as error:
        os.close(fd)
        raise InvalidArtifact(f"there is no memory for its tokenizer ({error.strerror})", key="bytes", value=len(content)) from None
    return fd


def _shared(index: WeightIndex) -> list[str]:
    """The files beside weights and index that a model needs, and others may, too."""
    text = index.signature.text
    return ([] if index.program.kind == "catalog" else [index.program.source]) + ([] if text is None else [text.tokenizer])


def _matches(fd: int, index: WeightIndex) -> bool:
    """Reads the file (never maps it: it might be cut short meanwhile) and compares its digest."""
    hasher = blake3()
    offset = 0
    while data := os.pread(fd, _READ_BYTES, offset):
        hasher.update(data)
        offset += len(data)
    return hasher.update(identity(index)).hexdigest() == index.digest


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, ValueError):
        return ""
