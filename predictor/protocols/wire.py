"""Protobuf messages whose large fields stay where they are: split before protobuf parses the rest, joined after it has written the rest.

Protobuf would copy a `bytes` field twice on each way. Knows the wire format, and of no message what it means.
https://protobuf.dev/programming-guides/encoding/
"""

from __future__ import annotations

from collections.abc import Iterable

from contracts.errors import InvalidValue

_VARINT, _I64, _LENGTH, _I32 = 0, 1, 2, 5
_FIXED_BYTES = {_I64: 8, _I32: 4}


def split(message: bytes | memoryview, field: int) -> tuple[bytes, list[memoryview]]:
    """(the message without `field`, the values of `field` in their order); `field` is a repeated `bytes` of the top level. InvalidValue if torn."""
    view, rest, values = memoryview(message), bytearray(), []
    at, end = 0, len(message)
    while at < end:
        start = at
        tag, at = _varint(message, at)
        kind = tag & 7
        if kind == _LENGTH:
            size, at = _varint(message, at)
            at += size
            if tag >> 3 == field and at <= end:
                values.append(view[at - size : at])
                continue
        elif kind == _VARINT:
            _, at = _varint(message, at)
        elif kind in _FIXED_BYTES:
            at += _FIXED_BYTES[kind]
        else:
            raise InvalidValue(f"the message is no protobuf: wire type {kind}")
        if at > end:
            raise InvalidValue("the message is torn")
        rest += view[start:at]
    return bytes(rest), values


def join(message: bytes, field: int, values: Iterable[memoryview]) -> bytes:
    """The message with `values` as its repeated `bytes` `field`, each copied once."""
    parts: list[bytes | memoryview] = [message]
    for value in values:
        parts += (_encoded(field << 3 | _LENGTH) + _encoded(value.nbytes), value)
    return b"".join(parts)


def _varint(message: bytes | memoryview, at: int) -> tuple[int, int]:
    """(value, where it ends)."""
    value = shift = 0
    while at < len(message) and shift < 64:
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise InvalidValue("the message is torn")


def _encoded(value: int) -> bytes:
    """A number as a varint."""
    found = bytearray()
    while value >= 0x80:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    found.append(value)
    return bytes(found)
