"""The body of an inference request as its pieces come from the parser, so that it is put together once, when it is whole.

uvicorn appends each piece to a buffer, stops reading, wakes the application, copies the buffer for it, and reads on; for a picture that is three
copies and ten turns of the loop. Owns this one shortcut; who reads a body in the usual way (ASGI's `receive`) still can.
"""

from __future__ import annotations

from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from contracts.units import KIB

_SMALL_BYTES = 4 * KIB
_SUFFIXES = (":predict", "/infer")
_KEY = "sluice.body"


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


class GatheringHttp(HttpToolsProtocol):
    """uvicorn's protocol; the bodies of inference requests gather in their scope."""

    _body: Body | None = None

    def on_headers_complete(self) -> None:
        """The head has ended."""
        super().on_headers_complete()
        scope: Any = self.scope
        self._body = scope[_KEY] = Body() if scope.get("method") == "POST" and scope["path"].endswith(_SUFFIXES) else None

    def on_body(self, body: bytes) -> None:
        """Part of the body; the application is woken by the end."""
        if self._body is None:
            super().on_body(body)
        elif not self.cycle.response_complete:
            self._body.add(body)
