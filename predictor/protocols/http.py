"""Inference over HTTP: the two routes that carry load (`:predict` and `/infer` with JSON), answered straight from the body's bytes.

Owns reading a body within its limit, and the answer's head. All other paths go to the application behind it.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from contracts.artifact import Signature
from contracts.errors import SluiceError
from predictor import tensors
from predictor.dispatch import Outcome
from predictor.front import ClientGone, Encode, Front, Receive, parameters, server_timing, timeout_ns
from predictor.protocols.codes import BodyTooLarge, codes
from predictor.tensors import Array

Scope = MutableMapping[str, Any]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

log = logging.getLogger("sluice.predictor")


class Http:
    """The ASGI application: inference with JSON bodies by itself, all else by `behind`."""

    def __init__(self, front: Front, behind: Application, max_body_bytes: int) -> None:
        self._front = front
        self._behind = behind
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        path = scope.get("path", "")
        if scope["type"] == "http" and scope["method"] == "POST":
            if path.startswith("/v1/models/") and path.endswith(":predict"):
                await self._serve(path[11:-8], _v1, scope, receive, send)
                return
            if path.startswith("/v2/models/") and path.endswith("/infer") and path.count("/") == 4:
                await self._serve(path[11:-6], _v2, scope, receive, send)
                return
        await self._behind(scope, receive, send)

    async def _serve(self, name: str, protocol: Callable[..., Any], scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        if b"inference-header-content-length" in headers or b"ce-specversion" in headers or b"cloudevents" in headers.get(b"content-type", b""):
            await self._behind(scope, receive, send)
            return
        try:
            body = await self._body(receive)
            timeout = timeout_ns(headers.get(b"sluice-timeout-ms"))
            payload, more = await self._front.infer(name, lambda signature: protocol(name, body, signature), timeout, receive)
            await _respond(send, 200, payload, more)
        except SluiceError as error:
            code, _, more = codes(error)
            await _respond(send, code, tensors.dump({"error": error.message}), more)
        except ClientGone:
            pass
        except Exception as error:
            log.exception("a request for %s could not be handled", name)
            await _respond(send, 500, tensors.dump({"error": f"{type(error).__name__}: {error}"}), {})

    async def _body(self, receive: Receive) -> bytes:
        chunks, size, more = [], 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            chunk = message.get("body", b"")
            size += len(chunk)
            if size > self._max_body_bytes:
                raise BodyTooLarge(f"must be at most {self._max_body_bytes} bytes", key="body", value=f"{size} bytes and more")
            chunks.append(chunk)
            more = message.get("more_body", False)
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)


Answered = tuple[bytes, Mapping[str, str]]


def _v1(_name: str, body: bytes, signature: Signature) -> tuple[Mapping[str, Array], Encode[Answered]]:
    """V1. Its answers have no place for the timing, so that goes into a Server-Timing header."""

    def encode(outputs: Mapping[str, Array], outcome: Outcome) -> Answered:
        return tensors.dump(tensors.encode_v1(outputs, signature)), {"server-timing": server_timing(outcome)}

    return tensors.decode_v1(tensors.parse(body), signature), encode


def _v2(name: str, body: bytes, signature: Signature) -> tuple[Mapping[str, Array], Encode[Answered]]:
    asked = tensors.decode_v2(tensors.parse(body), signature)

    def encode(outputs: Mapping[str, Array], outcome: Outcome) -> Answered:
        return tensors.dump(tensors.encode_v2(name, asked.id, outputs, signature, asked.outputs, parameters(outcome))), {}

    return asked.inputs, encode


async def _respond(send: Send, code: int, payload: bytes, headers: Mapping[str, str]) -> None:
    lines = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(payload))]
    lines += [(name.encode(), value.encode()) for name, value in headers.items()]
    if code == 413:
        lines.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": code, "headers": lines})
    await send({"type": "http.response.body", "body": payload})
