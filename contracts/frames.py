"""Frames: what messages are on a stream. A 4-byte big-endian length, then one message in MessagePack.

Owns the bytes of an unfinished frame. Never looks into a message, and allocates nothing for a frame that is longer than one may be.
"""

from __future__ import annotations

import msgspec

from contracts.errors import ProtocolError, SluiceError
from contracts.wire import Message

MAX_FRAME_BYTES = 4 << 20
HEADER_BYTES = 4

_encoder = msgspec.msgpack.Encoder()


def encode(message: Message) -> bytes:
    """One frame."""
    body = _encoder.encode(message)
    if len(body) > MAX_FRAME_BYTES:
        raise ProtocolError(f"a {type(message).__name__} of {len(body)} bytes is longer than a frame may be ({MAX_FRAME_BYTES})")
    return len(body).to_bytes(HEADER_BYTES, "big") + body


class FrameDecoder:
    """Bytes in, messages out. `expected` is the union of messages that this end may receive; anything else is a ProtocolError."""

    def __init__(self, expected: object) -> None:
        self._decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(expected)
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Message]:
        """The messages that are complete now. After a ProtocolError the stream is of no more use."""
        if self._buffer:
            self._buffer += data
            messages, used = self._frames(self._buffer)
            del self._buffer[:used]
        else:  # Nearly always: what came is whole frames.
            messages, used = self._frames(data)
            if used < len(data):
                self._buffer += data[used:]
        return messages

    def _frames(self, data: bytes | bytearray) -> tuple[list[Message], int]:
        """The messages of all whole frames, and how many bytes they took."""
        messages: list[Message] = []
        start, size = 0, len(data)
        while size - start >= HEADER_BYTES:
            body = start + HEADER_BYTES
            length = int.from_bytes(data[start:body], "big")
            if length > MAX_FRAME_BYTES:
                raise ProtocolError(f"a frame of {length} bytes is longer than {MAX_FRAME_BYTES}")
            if size < body + length:
                break
            start = body + length
            messages.append(self._decode(bytes(data[body:start])))
        return messages, start

    def _decode(self, body: bytes) -> Message:
        try:
            return self._decoder.decode(body)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise ProtocolError(f"a frame holds no message that is expected here ({error})") from None
        except SluiceError as error:
            raise ProtocolError(f"a frame holds a bad value: {error.message}") from None
