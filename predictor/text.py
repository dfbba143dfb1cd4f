"""Text inputs: BYTES tensors of every protocol to texts, and texts to the token inputs that the model takes.

Owns the tokenizers of this predictor (from the agent, one for each digest), the threads that run them, and the limits on text. Knows the framing of
BYTES tensors and no other part of a protocol. Never keeps the event loop for more than a sentence or two.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from tokenizers import Tokenizer

from contracts.artifact import TEXT, Signature, Text
from contracts.errors import ExecutionError, InvalidArtifact, InvalidTensor, Refused, Unavailable
from contracts.units import KIB, MIB
from models.tokenizer import build, encode
from predictor.tensors import NESTED, Array, Given, shown

_MOST_ROWS = 1024
_MOST_TEXT_BYTES = 64 * KIB
_MOST_WAITING_BYTES = 4 * MIB
"""Of text that waits for a thread: some seconds of work."""
_AT_ONCE_BYTES = 1 * KIB
"""What is tokenised in half a millisecond, and so at once."""
_THREADS = 2
_LENGTH_BYTES = 4


def find(given: Sequence[Given], signature: Signature) -> Given | None:
    """The text among the inputs of a request; None when there is none. InvalidTensor when this model takes no text, or not beside other inputs."""
    text = signature.text
    for one in given:
        if text is not None and one.name == text.name:
            if len(given) > 1:
                others = ", ".join(spec.name for spec in signature.inputs)
                raise InvalidTensor(f"must come alone, since it stands for {others}", key=one.name, value=[other.name for other in given])
            return one
        if one.datatype == TEXT:
            why = "this model takes no text, it came without a tokenizer" if text is None else f"text must come as the input {text.name!r}"
            raise InvalidTensor(why, key=one.name, value=TEXT)
    return None


def texts(given: Given) -> list[str]:
    """The texts of an input of shape [rows] or [rows, 1]; InvalidTensor names what is wrong with them."""
    name, shape, datatype, data = given
    if isinstance(data, list) and data and all(isinstance(row, list) and len(row) == 1 for row in data):
        data = [row[0] for row in data]
    if shape is NESTED:
        rows = len(data) if isinstance(data, list) else 0
    else:
        if datatype != TEXT:
            raise InvalidTensor(f"must be {TEXT}", key=f"{name}.datatype", value=shown(datatype))
        if not isinstance(shape, list) or not 1 <= len(shape) <= 2 or not all(type(size) is int for size in shape) or shape[1:] not in ([], [1]):
            raise InvalidTensor("must be [rows] or [rows, 1]", key=f"{name}.shape", value=shown(shape))
        rows = shape[0]
    if not 1 <= rows <= _MOST_ROWS:
        raise InvalidTensor(f"must have from 1 to {_MOST_ROWS} rows", key=name, value=rows)
    if isinstance(data, bytes | memoryview):
        data = _unframed(memoryview(data), rows, name)
    if not isinstance(data, list):
        raise InvalidTensor("must be a list of texts", key=f"{name}.data", value=shown(data))
    if len(data) != rows:
        raise InvalidTensor(f"must be {rows} texts, as its shape says", key=f"{name}.data", value=f"{len(data)} texts")
    return [_text(value, f"{name}[{row}]") for row, value in enumerate(data)]


def _unframed(data: memoryview, rows: int, name: str) -> list[bytes]:
    """The elements of a BYTES tensor in the binary layout: each behind its length, four bytes, little endian."""
    found, at = [], 0
    for row in range(rows):
        start = at + _LENGTH_BYTES
        end = start + int.from_bytes(data[at:start], "little")
        if end > len(data):
            raise InvalidTensor("is shorter than the lengths in it say", key=f"{name}[{row}]", value=f"{len(data)} bytes")
        found.append(bytes(data[start:end]))
        at = end
    if at != len(data):
        raise InvalidTensor(f"its {rows} texts take {at} bytes", key=f"{name}.data", value=f"{len(data)} bytes")
    return found


def _text(value: object, key: str) -> str:
    try:
        if isinstance(value, bytes):
            value, size = value.decode(), len(value)
        elif isinstance(value, str):
            size = len(value.encode())
        else:
            raise InvalidTensor("must be text", key=key, value=shown(value))
    except UnicodeError as error:
        raise InvalidTensor("must be UTF-8", key=key, value=str(error)) from None
    if size > _MOST_TEXT_BYTES:
        raise InvalidTensor(f"must have at most {_MOST_TEXT_BYTES} bytes", key=key, value=f"{size} bytes")
    return value


class Tokenizers:
    """The tokenizers by the name of their file. Runs on the event loop, works in its threads."""

    def __init__(self) -> None:
        self._fds: dict[str, int] = {}
        self._built: dict[Text, asyncio.Future[Tokenizer]] = {}
        self._threads = ThreadPoolExecutor(_THREADS, "tokenizer")
        self._waiting_bytes = 0

    def add(self, name: str, fd: int) -> None:
        """The agent's copy of a tokenizer; takes the descriptor."""
        if name in self._fds:
            os.close(fd)
        else:
            self._fds[name] = fd

    def forget(self, name: str) -> None:
        """No function needs it any more."""
        fd = self._fds.pop(name, None)
        if fd is not None:
            os.close(fd)
        self._built = {text: built for text, built in self._built.items() if text.tokenizer != name}

    def prepare(self, text: Text) -> asyncio.Future[Tokenizer]:
        """Begins to build a tokenizer, if nobody has; the outcome is kept."""
        built = self._built.get(text)
        if built is None:
            fd = self._fds.get(text.tokenizer)
            if fd is None:
                raise Unavailable("the tokenizer of this model has not come yet", retry_after_ms=1000)
            built = asyncio.get_running_loop().run_in_executor(None, _build, os.dup(fd), text.max_tokens)
            built.add_done_callback(lambda done: done.cancelled() or done.exception())  # whoever awaits it is told; it may be nobody
            self._built[text] = built
        return built

    async def inputs(self, given: Given, signature: Signature, most_rows: int) -> dict[str, Array]:
        """The token inputs [rows, tokens] of a text input. InvalidTensor, or Refused when more text waits than the threads can work off soon."""
        text = signature.text
        assert text is not None
        found = texts(given)
        if len(found) > most_rows:
            raise InvalidTensor(f"this model takes at most {most_rows} rows a request", key=text.name, value=len(found))
        size = sum(map(len, found))
        if self._waiting_bytes + size > _MOST_WAITING_BYTES:
            raise Refused("too much text waits to be tokenised", retry_after_ms=1000)
        self._waiting_bytes += size
        try:
            tokenizer = await asyncio.shield(self.prepare(text))
            if size <= _AT_ONCE_BYTES:
                return encode(tokenizer, signature, found)
            return await asyncio.get_running_loop().run_in_executor(self._threads, encode, tokenizer, signature, found)
        except InvalidArtifact as error:
            raise ExecutionError(error.message) from error
        finally:
            self._waiting_bytes -= size


def _build(fd: int, max_tokens: int) -> Tokenizer:
    """Reads by position: the descriptor shares its offset with every other predictor's."""
    try:
        content = os.pread(fd, os.fstat(fd).st_size, 0)
    finally:
        os.close(fd)
    return build(content, max_tokens)
