"""Triton's model repository extension: which models there are, and taking one out of this predictor or back in.

Owns the views and the meaning of a request's parameters. What unloading does, and what it leaves alone, is docs/decisions/0005-load-and-unload.md.
https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_model_repository.md
"""

from __future__ import annotations

from collections.abc import Mapping

from contracts.errors import InvalidValue
from contracts.units import S
from predictor.front import VERSION, Front
from predictor.protocols.metadata import View

_LOAD_TIMEOUT_NS = 60 * S
"""How long a load waits where its caller sets no limit."""


def index(front: Front, ready_only: bool = False) -> list[View]:
    """Every model: name, version, state (READY, LOADING, UNAVAILABLE) and, unless it is ready, the reason."""
    found = []
    for name in front.dispatcher.names:
        served = front.dispatcher.find(name)
        why = front.dispatcher.unready(served)
        state = "READY" if not why else "UNAVAILABLE" if not served.loaded or served.info.state == "failed" else "LOADING"
        if state == "READY" or not ready_only:
            found.append({"name": name, "version": VERSION, "state": state, "reason": why if served.loaded else "unloaded"})
    return found


async def load(front: Front, name: str, parameters: Mapping[str, object], timeout_ns: int | None) -> View:
    """Brings a model back and waits until it is ready; InvalidValue, NotFound, or Unavailable with the reason."""
    for key in parameters:
        raise InvalidValue("a model is served as its InferenceService declares it: load takes no parameters", key="parameters", value=key)
    await front.dispatcher.load(name, timeout_ns or _LOAD_TIMEOUT_NS)
    return {"name": name, "load": True}


def unload(front: Front, name: str, parameters: Mapping[str, object]) -> View:
    """Takes a model out; InvalidValue, NotFound."""
    for key in parameters.keys() - {"unload_dependents"}:
        raise InvalidValue("unload takes unload_dependents only", key="parameters", value=key)
    front.dispatcher.unload(name)
    return {"name": name, "unload": True}
