"""The loader process: loads models into the host store, one after the other, for the node agent.

    python -m models.loader --store DIR

Lines in: {"id", "format", "source", "limit_bytes"}; lines out: {"id", "digest", "bytes"} or {"id", "error": [kind, message]}. It ends at the end of
its input. Owns stdin and stdout; whatever else prints goes to stderr. Never keeps a model once it is written.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
from pathlib import Path
from typing import BinaryIO

import msgspec
import torch

from contracts.errors import ProtocolError, Unavailable, to_wire
from contracts.functions import ModelFormat, ModelRef
from models import store as files
from models.load import load
from models.store_writer import remember, write

_LARGE_BYTES = 64 << 20


class Request(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Load one model; its files may take `limit_bytes`."""

    id: int
    format: ModelFormat
    source: str
    limit_bytes: int


class Reply(msgspec.Struct, frozen=True, omit_defaults=True):
    """The outcome. `bytes` are those of the weight file."""

    id: int
    digest: str = ""
    bytes: int = 0
    error: tuple[str, str] | None = None


def answer(line: bytes, store: Path) -> Reply:
    """The reply to one line; every error becomes part of it."""
    try:
        request = msgspec.json.decode(line, type=Request)
    except msgspec.MsgspecError as error:
        return _failed(0, ProtocolError(f"a line is no request ({error})"))
    try:
        ref = ModelRef(request.format, request.source)
        name = files.ref_name(ref)
        index = write(load(ref), store, request.limit_bytes)
        _remember(store, name, index.digest)
        return Reply(request.id, index.digest, index.total_bytes)
    except MemoryError:
        return _failed(request.id, Unavailable("there is no memory to load the model"))
    except Exception as error:
        return _failed(request.id, error)


def serve(requests: BinaryIO, replies: BinaryIO, store: Path) -> None:
    """Answers until the input ends."""
    for line in requests:
        reply = answer(line, store)
        replies.write(msgspec.json.encode(reply) + b"\n")
        replies.flush()
        if reply.bytes > _LARGE_BYTES:
            gc.collect()


def main() -> None:
    """The process. Nothing but replies reaches the agent's pipe, whatever a library prints."""
    parser = argparse.ArgumentParser(prog="python -m models.loader", description=__doc__.splitlines()[0])
    parser.add_argument("--store", type=Path, required=True, help="the folder of the host weight store")
    store: Path = parser.parse_args().store
    torch.set_num_threads(1)
    with os.fdopen(os.dup(sys.stdout.fileno()), "wb") as replies:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        for left in store.glob(f"{files.TEMPORARY}*"):
            left.unlink(missing_ok=True)
        serve(sys.stdin.buffer, replies, store)


def _remember(store: Path, name: str, digest: str) -> None:
    """Notes the digest for the next agent. Without a note the model is served all the same: it is whole, and only read again after a restart."""
    try:
        remember(store, name, digest)
    except Unavailable as error:
        print(f"the next agent will read {digest} again: {error.message}", file=sys.stderr)


def _failed(request: int, error: BaseException) -> Reply:
    kind, message, _ = to_wire(error)
    return Reply(request, error=(kind, message))


if __name__ == "__main__":
    main()
