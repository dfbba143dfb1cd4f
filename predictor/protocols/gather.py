"""Inference over uvicorn's protocol with fewer steps: a request's body is put together once, and a small answer leaves in one write.

uvicorn appends each piece of a body to a buffer, stops reading, wakes the application, copies the buffer for it, and reads on; for a picture that is
three copies and ten turns of the loop. It writes an answer's head by itself, which wakes the client for nothing. Owns these two shortcuts; who reads
a body in the usual way (ASGI's `receive`) still can.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from contracts.units import KIB

_SMALL_BYTES = 4 * KIB
_SUFFIXES = (":predict", "/infer")
_KEY = "sluice.body"
_JOINED_BYTES = 64 * KIB
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class Body:
    """The pieces that are there. Small ones are joined at once: an object for each byte would be forty times as large."""

    __slots__ = ("nbytes", "pieces")

    def __init__(self) -> None:
        self.nbytes = 0
        self.pieces: list[bytes | bytearray] = []

    def add(self, piece: bytes) -> None:
        """One more."""
        self.nbytes += len(piece)
        if len(piece) >= _SMALL_BYTES or not self.pieces:
            self.pieces.append(piece)
        elif isinstance(self.pieces[-1], bytearray):
            self.pieces[-1] += piece
        else:
            self.pieces.append(bytearray(piece))

    def whole(self) -> bytes:
        """All of it in one."""
        return self.pieces[0] if len(self.pieces) == 1 and isinstance(self.pieces[0], bytes) else b"".join(self.pieces)


def body_of(scope: Any) -> Body:
    """Where the body of this request gathers; `receive` says when more of it is there. Pieces that `receive` itself brings are to be added to it."""
    found = scope.get(_KEY)
    return found if isinstance(found, Body) else Body()


class _Whole(asyncio.Transport):
    """The transport of one answer, which keeps the head until the body comes: a small one goes with it, a large one is not copied."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._head: bytes | None = None

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self._head is None and data != _CONTINUE:
            self._head = bytes(data)
        elif self._head:
            head, self._head = self._head, b""
            if len(data) <= _JOINED_BYTES:
                self._transport.write(head + data)
            else:
                self._transport.write(head)
                self._transport.write(data)
        else:
            self._transport.write(data)

    def is_closing(self) -> bool:
        return self._transport.is_closing()

    def close(self) -> None:
        if self._head:
            self._transport.write(self._head)
        self._transport.close()


class GatheringHttp(HttpToolsProtocol):
    """uvicorn's protocol; the bodies of inference requests gather in their scope, and their answers leave whole."""

    _body: Body | None = None

    def on_headers_complete(self) -> None:
        """The head has ended."""
        super().on_headers_complete()
        scope: Any = self.scope
        self._body = scope[_KEY] = Body() if scope.get("method") == "POST" and scope["path"].endswith(_SUFFIXES) else None
        if self._body is not None:
            self.cycle.transport = _Whole(self.transport)

    def on_body(self, body: bytes) -> None:
        """Part of the body; the application is woken by the end."""
        if self._body is None:
            super().on_body(body)
        elif not self.cycle.response_complete:
            self._body.add(body)
