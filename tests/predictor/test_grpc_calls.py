"""gRPC's framing, deadlines and statuses as its protocol document has them."""

from __future__ import annotations

import gzip
import struct
import zlib
from urllib.parse import unquote

import pytest

from contracts.errors import InvalidValue, SluiceError
from contracts.units import MS, US, S
from predictor.protocols.codes import BodyTooLarge, NotServed, Status
from predictor.protocols.grpc_calls import message_of, prefix_of, status_headers, timeout_ns

LIMIT = 1000


def framed(message: bytes, compressed: int = 0) -> bytes:
    return struct.pack(">BI", compressed, len(message)) + message


WHOLE = {
    "plain": (framed(b"abc"), b"identity", b"abc"),
    "empty": (framed(b""), b"identity", b""),
    "plain, though the call may compress": (framed(b"abc"), b"gzip", b"abc"),
    "gzip": (framed(gzip.compress(b"abc"), 1), b"gzip", b"abc"),
    "deflate": (framed(zlib.compress(b"abc"), 1), b"deflate", b"abc"),
    "as large as may be": (framed(gzip.compress(b"a" * LIMIT), 1), b"gzip", b"a" * LIMIT),
}


@pytest.mark.parametrize(("body", "encoding", "message"), WHOLE.values(), ids=WHOLE)
def test_a_message(body: bytes, encoding: bytes, message: bytes) -> None:
    assert bytes(message_of(body, encoding, LIMIT)) == message


BROKEN: dict[str, tuple[bytes, bytes, type[SluiceError]]] = {
    "nothing": (b"", b"identity", InvalidValue),
    "half a prefix": (b"\0\0", b"identity", InvalidValue),
    "shorter than it says": (framed(b"abc")[:-1], b"identity", InvalidValue),
    "two messages": (framed(b"abc") * 2, b"identity", NotServed),
    "an unknown encoding": (framed(b"abc", 1), b"br", NotServed),
    "compressed without an encoding": (framed(b"abc", 1), b"identity", NotServed),
    "no gzip": (framed(b"abc", 1), b"gzip", InvalidValue),
    "torn gzip": (framed(gzip.compress(b"abc")[:-9], 1), b"gzip", InvalidValue),
    "a bomb": (framed(gzip.compress(b"\0" * (64 << 20)), 1), b"gzip", BodyTooLarge),
}


@pytest.mark.parametrize(("body", "encoding", "error"), BROKEN.values(), ids=BROKEN)
def test_what_is_no_message(body: bytes, encoding: bytes, error: type[SluiceError]) -> None:
    with pytest.raises(error) as caught:
        message_of(body, encoding, LIMIT)
    assert type(caught.value) is error


def test_an_answer_reads_as_a_message() -> None:
    assert bytes(message_of(prefix_of(b"abc") + b"abc", b"identity", LIMIT)) == b"abc"


@pytest.mark.parametrize(
    ("text", "ns"), [(b"1H", 3600 * S), (b"2M", 120 * S), (b"3S", 3 * S), (b"4m", 4 * MS), (b"99999999u", 99_999_999 * US), (b"0n", 0)]
)
def test_a_timeout(text: bytes, ns: int) -> None:
    assert timeout_ns(text) == ns


def test_without_a_timeout_there_is_none() -> None:
    assert timeout_ns(None) is None


@pytest.mark.parametrize("text", [b"", b"S", b"1", b"1s", b"1.5S", b"-1S", b"123456789S", b"\xb2S"])
def test_what_is_no_timeout(text: bytes) -> None:
    with pytest.raises(InvalidValue, match="grpc-timeout"):
        timeout_ns(text)


@pytest.mark.parametrize("message", ["too busy", "100 % süß\n", "", "quote '\" and tab\t"])
def test_a_status_says_why_in_printable_bytes(message: str) -> None:
    fields = dict(status_headers(Status.RESOURCE_EXHAUSTED, message, {"retry-after": "3"}))
    assert (fields[b"grpc-status"], fields[b"retry-after"]) == (b"8", b"3")
    assert all(0x20 <= byte < 0x7F for byte in fields[b"grpc-message"])
    assert unquote(fields[b"grpc-message"].decode()) == message
