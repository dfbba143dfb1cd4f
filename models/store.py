"""The host weight store, a folder in shared memory: names, digests, and what is complete in it.

Owns the files' names and their checking. Imports no torch, so that the node agent can adopt what an earlier one left. A model is there when its
`<digest>.json` is; whatever is written is written under a temporary name and renamed.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import msgspec
from blake3 import blake3

from contracts.artifact import Text, WeightIndex, decode_index
from contracts.errors import InvalidArtifact
from contracts.functions import ModelFormat, ModelRef
from models import catalogue
from models.archive import locate

TEMPORARY = ".tmp-"
"""What the names of unfinished files begin with; a crash may leave one, and whoever owns the store may remove it."""


def identity(index: WeightIndex) -> bytes:
    """What a digest covers beside the weights: layout, program, signature. The measured time is left out, so loading again gives the same digest."""
    return msgspec.json.encode((index.version, index.total_bytes, index.tensors, index.gates, index.program, index.signature))


def ref_name(ref: ModelRef) -> str:
    """The name of the file that remembers which digest `ref` has; it changes with the files. InvalidArtifact as `load` raises it."""
    hasher = blake3(f"{ref.format}\0{ref.source}".encode())
    for path in _files(ref):
        status = os.stat(path)
        hasher.update(f"\0{path}\0{status.st_size}\0{status.st_mtime_ns}".encode())
    return f"{hasher.hexdigest()}.ref"


def find(store: Path, ref: ModelRef) -> WeightIndex | None:
    """The model that `ref` was loaded as, if it is still there and the same; not yet verified."""
    try:
        digest = (store / ref_name(ref)).read_text("ascii").strip()
        return read_index(store, digest)
    except (OSError, ValueError, InvalidArtifact):
        return None


def read_index(store: Path, digest: str) -> WeightIndex:
    """The index of a digest; InvalidArtifact when it is absent, torn or another's."""
    if len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
        raise InvalidArtifact("is no digest", key="digest", value=digest[:80])
    try:
        index = decode_index((store / f"{digest}.json").read_bytes())
        size = os.path.getsize(store / f"{digest}.weights")
    except OSError as error:
        raise InvalidArtifact(f"is not in the store ({error.strerror})", key="digest", value=digest) from None
    if index.digest != digest or size != index.total_bytes:
        raise InvalidArtifact("is torn", key="digest", value=digest)
    if index.program.kind != "catalog" and not (store / index.program.source).is_file():
        raise InvalidArtifact("has lost its program file", key="digest", value=digest)
    return index


def tokenizer(store: Path, text: Text) -> bytes:
    """A tokenizer of the store; InvalidArtifact when it is absent or damaged."""
    try:
        content = (store / text.tokenizer).read_bytes()
    except OSError as error:
        raise InvalidArtifact(f"cannot be read ({error.strerror})", key="tokenizer", value=text.tokenizer) from None
    if f"{blake3(content).hexdigest()}.tokenizer" != text.tokenizer:
        raise InvalidArtifact("does not match its name: the file is damaged", key="tokenizer", value=text.tokenizer)
    return content


def verify(store: Path, digest: str) -> WeightIndex:
    """The index of a digest whose weights and tokenizer were read whole and found to be what their names say; InvalidArtifact otherwise."""
    index = read_index(store, digest)
    if index.signature.text is not None:
        tokenizer(store, index.signature.text)
    with open(store / f"{digest}.weights", "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        found = blake3(content).update(identity(index)).hexdigest()
    if found != digest:
        raise InvalidArtifact("has changed since it was written: the file is damaged", key="digest", value=digest)
    return index


def _files(ref: ModelRef) -> list[Path]:
    if ref.format is ModelFormat.CATALOG:
        choice = catalogue.parse(ref.source)
        named = (choice.pretrained.path() if choice.pretrained else None, choice.tokenizer_path())
        return [path for path in named if path is not None and path.is_file()]
    path = locate(ref.source)
    folder = path if path.is_dir() else path.parent
    names = ("config.json", "modules.json", "signature.json", f"{path.stem}.signature.json", "tokenizer.json", "sentence_bert_config.json")
    beside = [folder / name for name in names]
    inside = sorted(folder.glob("*.*")) if path.is_dir() else [path]
    return [file for file in dict.fromkeys((*inside, *beside)) if file.is_file()]
