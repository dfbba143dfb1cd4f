"""A bound on the head of an HTTP request, which uvicorn's parser would otherwise gather without end, before any admission."""

from __future__ import annotations

from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 512 << 10
"""Request line and headers, with what is read along with them (one read brings 256 KiB at most)."""


class BoundedHttp(HttpToolsProtocol):
    """uvicorn's protocol; a longer head gets 400 and the end of its connection."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._in_head = True
        self._head_bytes = 0

    def data_received(self, data: bytes) -> None:
        """Part of one or of several requests."""
        super().data_received(data)
        if self._in_head:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
                self.send_400_response("The head of the request is too long.")

    def on_headers_complete(self) -> None:
        """The head has ended; what follows is counted as the body."""
        self._in_head = False
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The next request begins with its head."""
        self._in_head = True
        self._head_bytes = 0
        super().on_message_complete()
