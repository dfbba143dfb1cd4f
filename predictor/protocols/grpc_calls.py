"""gRPC's own layer above HTTP/2: how a message, a deadline and a status are written. Pure: bytes in, bytes out.

Knows no sockets and no service.
https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import NamedTuple
from urllib.parse import quote

from contracts.errors import InvalidValue
from contracts.units import MS, US, S
from predictor.protocols.codes import BodyTooLarge, NotServed, Status

Headers = Sequence[tuple[bytes, bytes]]

PREFIX_BYTES = 5
"""Before each message: whether it is compressed, and its length."""
_WINDOW_BITS = {b"gzip": 31, b"deflate": 15}
"""Encoding -> what zlib wants to know of it."""
_UNITS_NS = {ord("H"): 3600 * S, ord("M"): 60 * S, ord("S"): S, ord("m"): MS, ord("u"): US, ord("n"): 1}
_PRINTABLE = "".join(chr(code) for code in range(0x20, 0x7F) if chr(code) != "%")


class Request(NamedTuple):
    """What a method is given: its message, the headers (names in lower case, pseudo-headers included), and the time left, if there is a deadline."""

    message: bytes | memoryview
    headers: Headers
    timeout_ns: int | None


Method = Callable[[Request], Awaitable[bytes]]
"""Answers one message with another. A SluiceError becomes the call's status."""


def message_of(body: bytes, encoding: bytes, limit_bytes: int) -> bytes | memoryview:
    """The one message of a unary call's body.

    InvalidValue if it is torn, BodyTooLarge if it unpacks to more than the limit, NotServed where there are several or the encoding is unknown.
    """
    if len(body) < PREFIX_BYTES:
        raise InvalidValue("the call has no whole message")
    compressed, size = struct.unpack_from(">BI", body)
    if size > len(body) - PREFIX_BYTES:
        raise InvalidValue("the message is torn")
    if size < len(body) - PREFIX_BYTES:
        raise NotServed("the method takes one message")
    message = memoryview(body)[PREFIX_BYTES:]
    return _unpacked(message, encoding, limit_bytes) if compressed else message


def _unpacked(message: memoryview, encoding: bytes, limit_bytes: int) -> bytes:
    if encoding not in _WINDOW_BITS:
        raise NotServed(f"the message's encoding is unknown; known are identity, {', '.join(name.decode() for name in _WINDOW_BITS)}")
    unpacker = zlib.decompressobj(_WINDOW_BITS[encoding])
    try:
        found = unpacker.decompress(message, limit_bytes + 1)
    except zlib.error as error:
        raise InvalidValue(f"the message cannot be unpacked: {error}") from None
    if len(found) > limit_bytes:
        raise too_large(limit_bytes)
    if not unpacker.eof:
        raise InvalidValue("the packed message is torn")
    return found


def too_large(limit_bytes: int) -> BodyTooLarge:
    """The error of a message beyond the limit."""
    return BodyTooLarge(f"message: must be at most {limit_bytes} bytes")


def prefix_of(message: bytes) -> bytes:
    """What goes before an answer's message; it is never compressed."""
    return struct.pack(">BI", 0, len(message))


def timeout_ns(value: bytes | None) -> int | None:
    """A `grpc-timeout` in ns, None without one; InvalidValue if it is none."""
    if value is None:
        return None
    digits, unit = value[:-1], value[-1:]
    if not digits.isdigit() or len(digits) > 8 or unit[0] not in _UNITS_NS:
        raise InvalidValue("must be up to 8 digits and one of H, M, S, m, u, n", key="grpc-timeout", value=value[:20].decode("latin-1"))
    return int(digits) * _UNITS_NS[unit[0]]


def status_headers(status: Status, message: str, more: Mapping[str, str]) -> Iterable[tuple[bytes, bytes]]:
    """A status other than OK as header fields; `more` goes along as metadata."""
    yield b"grpc-status", b"%d" % status
    yield b"grpc-message", quote(message, safe=_PRINTABLE).encode()
    for name, value in more.items():
        yield name.encode(), value.encode()
