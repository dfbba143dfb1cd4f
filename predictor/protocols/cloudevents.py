"""V1 requests that come as CloudEvents, structured or binary, and their answers as events of the same mode, as KServe gives them.

Owns telling an event from a plain document. https://github.com/cloudevents/spec/blob/v1.0.2/cloudevents/bindings/http-protocol-binding.md
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from cloudevents.exceptions import GenericException
from cloudevents.http import CloudEvent, from_http, to_binary, to_structured

from contracts.errors import InvalidValue
from predictor.tensors import parse, shown

_STRUCTURED = "application/cloudevents+json"
_TYPE = "io.kserve.inference.response"


class Event(NamedTuple):
    """A request that came as an event: its data, and the mode that its answer takes too."""

    document: Any
    structured: bool

    def answer(self, model: str, document: bytes) -> tuple[bytes, dict[str, str]]:
        """(body, headers) of the answer."""
        attributes = {"type": _TYPE, "source": f"io.kserve.inference.{model}"}
        headers, body = (to_structured if self.structured else to_binary)(CloudEvent(attributes, parse(document)))
        return body, {**headers, "content-type": _STRUCTURED if self.structured else "application/json"}


def decode(body: bytes, headers: Mapping[bytes, bytes]) -> Event | None:
    """The event of a request; None where it is none. InvalidValue for one that is torn."""
    structured = headers.get(b"content-type", b"").startswith(_STRUCTURED.encode())
    if not structured and b"ce-specversion" not in headers:
        return None
    named = {name.decode("latin-1"): value.decode("latin-1") for name, value in headers.items()}
    try:
        data = from_http(named, body, lambda data: data).data
    except (GenericException, ValueError, TypeError) as error:
        raise InvalidValue(f"the body is no CloudEvent: {error}") from None
    if isinstance(data, bytes | str):
        data = parse(data if isinstance(data, bytes) else data.encode())
    if not isinstance(data, dict):
        raise InvalidValue('must be {"instances": [...]}', key="data", value=shown(data))
    return Event(data, structured)
