"""What the server and its models say of themselves: V2's and Triton's metadata, Triton's model configuration, readiness.

Owns these views, as the dictionaries that both JSON and protobuf's own mapping of JSON are written from. Knows no route.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version as installed
from typing import Any

from contracts.artifact import TensorSpec
from contracts.errors import Unavailable
from predictor.dispatch import Served
from predictor.front import VERSION, Front, check_version

EXTENSIONS = ("binary_tensor_data", "model_configuration", "model_repository", "parameters", "statistics")
"""As Triton names them: https://github.com/triton-inference-server/server/tree/main/docs/protocol"""

View = dict[str, Any]


def find(front: Front, name: str, version: str = "") -> Served:
    """The function behind a model's name, or NotFound."""
    served = front.dispatcher.find(name)
    check_version(name, version)
    return served


def server(_front: Front) -> View:
    """Name, version, extensions."""
    return {"name": "sluice", "version": installed("sluice"), "extensions": list(EXTENSIONS)}


def server_ready(front: Front) -> bool:
    """Whether the node agent is there, and this process is not on its way down."""
    return front.dispatcher.client.connected and not front.dispatcher.draining


def check_server_ready(front: Front) -> View:
    """The readiness of the server, or Unavailable."""
    if not server_ready(front):
        raise Unavailable("the server is shutting down" if front.dispatcher.draining else "the server waits for its node agent")
    return {"ready": True}


def model_ready(front: Front, name: str, version: str = "") -> bool:
    """Whether a request for this model would be run at once, and this process is not on its way down; NotFound."""
    return not front.dispatcher.unready(find(front, name, version)) and not front.dispatcher.draining


def check_model_ready(front: Front, name: str, version: str = "") -> View:
    """The readiness of a model, or Unavailable with the reason; NotFound."""
    why = front.dispatcher.unready(find(front, name, version)) or ("is served by a server that is shutting down" if front.dispatcher.draining else "")
    if why:
        raise Unavailable(f"{name} {why}")
    return {"name": name, "ready": True}


def models(front: Front) -> View:
    """The names of all models."""
    return {"models": list(front.dispatcher.names)}


def model(front: Front, name: str, version: str = "") -> View:
    """V2's model metadata; -1 stands for a dimension that a request chooses. NotFound; Unavailable until the model has been loaded once."""
    served = find(front, name, version)
    signature = served.info.signature or front.dispatcher.signature(served)

    def tensors(specs: Sequence[TensorSpec]) -> list[View]:
        return [{"name": spec.name, "datatype": spec.dtype, "shape": _sizes(spec)} for spec in specs]

    platform = served.info.function.model.format.value
    return {"name": name, "versions": [VERSION], "platform": platform, "inputs": tensors(signature.accepts), "outputs": tensors(signature.outputs)}


def config(front: Front, name: str, version: str = "") -> View:
    """Triton's model configuration. Where requests are batched, `dims` leave out the rows. Errors as `model`."""
    served = find(front, name, version)
    signature = served.info.signature or front.dispatcher.signature(served)
    function, skip = served.info.function, 1 if signature.batchable else 0

    def tensors(specs: Sequence[TensorSpec]) -> list[View]:
        return [{"name": spec.name, "data_type": _TRITON.get(spec.dtype, f"TYPE_{spec.dtype}"), "dims": _sizes(spec)[skip:]} for spec in specs]

    optional = {} if signature.text is None else {"optional": True}  # either the text or all the others

    return {
        "name": name,
        "platform": function.model.format.value,
        "backend": "sluice",
        "version_policy": {"latest": {"num_versions": 1}},
        "max_batch_size": function.max_batch if signature.batchable else 0,
        "input": [tensor | optional for tensor in tensors(signature.accepts)],
        "output": tensors(signature.outputs),
        **({"dynamic_batching": {"preferred_batch_size": [function.max_batch]}} if signature.batchable else {}),
    }


_TRITON: Mapping[str, str] = {"BYTES": "TYPE_STRING"}


def _sizes(spec: TensorSpec) -> list[int]:
    return [dim if isinstance(dim, int) else -1 for dim in spec.shape]
