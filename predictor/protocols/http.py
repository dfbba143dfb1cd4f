"""Inference over HTTP: the routes that carry load, `:predict` and `/infer`, answered straight from the body's bytes.

Owns the answer's head; how large a body may be is `limits`. All other paths go to the application behind it.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from contracts.artifact import Signature
from contracts.errors import InvalidValue, SluiceError
from predictor import tensors
from predictor.dispatch import Outcome
from predictor.front import ClientGone, Decoded, Front, Receive, parameters, server_timing, timeout_ns
from predictor.protocols import cloudevents, v1, v2
from predictor.protocols.codes import codes
from predictor.protocols.gather import body_of
from predictor.tensors import Array

Scope = MutableMapping[str, Any]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]
Headers = Mapping[bytes, bytes]
Answer = tuple[bytes, dict[str, str]]
"""A body, and the headers that go with it."""
Decode = Callable[[str, bytes, Headers, Signature], Decoded[Answer]]

_JSON = {"content-type": "application/json"}
_HEADER_LENGTH = "inference-header-content-length"
log = logging.getLogger("sluice.predictor")


class Http:
    """The ASGI application: inference by itself, all else by `behind`."""

    def __init__(self, front: Front, behind: Application) -> None:
        self._front = front
        self._behind = behind

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        path = scope.get("path", "")
        if scope["type"] == "http" and scope["method"] == "POST":
            if path.startswith("/v1/models/") and path.endswith(":predict"):
                await self._serve(path[11:-8], "", _v1, scope, receive, send)
                return
            if path.startswith("/v2/models/") and path.endswith("/infer"):
                name, slash, version = path[11:-6].partition("/versions/")
                if "/" not in name and "/" not in version and (version or not slash):
                    await self._serve(name, version, _v2, scope, receive, send)
                    return
        await self._behind(scope, receive, send)

    async def _serve(self, name: str, version: str, decode: Decode, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        try:
            body = await self._body(scope, receive)
            timeout = timeout_ns(headers.get(b"sluice-timeout-ms"))
            answer, more = await self._front.infer(
                name, lambda signature: decode(name, body, headers, signature), timeout, receive, version, scope["headers"]
            )
            await _respond(send, 200, answer, more)
        except SluiceError as error:
            code, _, more = codes(error)
            await _respond(send, code, tensors.dump({"error": error.message}), {**_JSON, **more})
        except ClientGone:
            pass
        except Exception as error:
            log.exception("a request for %s could not be handled", name)
            await _respond(send, 500, tensors.dump({"error": f"{type(error).__name__}: {error}"}), _JSON)

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        body, more = body_of(scope), True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            if piece := message.get("body", b""):
                body.add(piece)
            more = message.get("more_body", False)
        return body.whole()


def _v1(name: str, body: bytes, headers: Headers, signature: Signature) -> Decoded[Answer]:
    """V1. Its answers have no place for the timing, so that goes into a Server-Timing header."""
    event = cloudevents.decode(body, headers)
    document = tensors.parse(body) if event is None else event.document

    def encode(outputs: Mapping[str, Array], outcome: Outcome) -> Answer:
        answer = tensors.dump(v1.encode(outputs, signature))
        answer, more = (answer, _JSON) if event is None else event.answer(name, answer)
        return answer, {**more, "server-timing": server_timing(outcome)}

    return Decoded(v1.decode(document, signature), encode)


def _v2(name: str, body: bytes, headers: Headers, signature: Signature) -> Decoded[Answer]:
    asked = v2.decode(body, _json_bytes(headers), signature)

    def encode(outputs: Mapping[str, Array], outcome: Outcome) -> Answer:
        answer, json_bytes = v2.encode(name, asked, outputs, signature, parameters(outcome))
        if json_bytes is None:
            return answer, _JSON
        return answer, {"content-type": "application/octet-stream", _HEADER_LENGTH: str(json_bytes)}

    return Decoded(asked.given, encode)


def _json_bytes(headers: Headers) -> int | None:
    """The Inference-Header-Content-Length, None without one."""
    value = headers.get(_HEADER_LENGTH.encode())
    if value is None:
        return None
    if not value.isdigit() or len(value) > 18:
        raise InvalidValue("must be a number of bytes", key="Inference-Header-Content-Length", value=value.decode("latin-1"))
    return int(value)


async def _respond(send: Send, code: int, payload: bytes, headers: Mapping[str, str]) -> None:
    lines = [(b"content-length", b"%d" % len(payload))]
    lines += [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": code, "headers": lines})
    await send({"type": "http.response.body", "body": payload})
