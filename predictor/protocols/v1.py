"""KServe's V1: `{"instances": [row, ...]}` in, `{"predictions": [row, ...]}` out.

A row is an array, or an object by tensor name; always an object when there are several inputs or outputs. A row of a model that takes text may be a
text, or an object that holds it. Owns this dialect and no other. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from contracts.artifact import Signature
from contracts.errors import InvalidTensor
from predictor.tensors import NESTED, Array, Given, readable, shown


def decode(document: object, signature: Signature) -> list[Given]:
    """The inputs of a document. For a model that takes no batches, `instances` holds exactly one row, and that row is the whole input."""
    if not isinstance(document, dict) or "instances" not in document:
        raise InvalidTensor('write {"instances": [...]}', key="body", value=shown(document))
    rows = document["instances"]
    if not isinstance(rows, list) or not rows:
        raise InvalidTensor("must be a list of at least one row", key="instances", value=shown(rows))
    if not signature.batchable and len(rows) != 1:
        raise InvalidTensor("this model takes one row a request", key="instances", value=f"{len(rows)} rows")
    return [Given(name, NESTED, None, values if signature.batchable else values[0]) for name, values in _columns(rows, signature).items()]


def _columns(rows: list[Any], signature: Signature) -> dict[str, list[Any]]:
    """Rows to one list a input."""
    names = [spec.name for spec in signature.inputs]
    text = signature.text
    if text is not None and (isinstance(rows[0], str) or (isinstance(rows[0], dict) and text.name in rows[0])):
        names = [text.name]
    if not isinstance(rows[0], dict):
        if len(names) != 1:
            raise InvalidTensor(f"a row must be an object with the inputs {', '.join(names)}", key="instances", value=shown(rows[0]))
        return {names[0]: rows}
    for number, row in enumerate(rows):
        if not isinstance(row, dict) or row.keys() != set(names):
            raise InvalidTensor(f"must be an object with the inputs {', '.join(names)}", key=f"instances[{number}]", value=shown(row))
    return {name: [row[name] for row in rows] for name in names}


def encode(outputs: Mapping[str, Array], signature: Signature) -> dict[str, object]:
    """The document of an answer."""
    found = {spec.name: readable(outputs[spec.name], spec.dtype) for spec in signature.outputs}
    found = {name: array.reshape(1)[0] if array.ndim == 0 else array for name, array in found.items()}
    if len(found) == 1:
        (only,) = found.values()
        return {"predictions": only if signature.batchable else [only]}
    if not signature.batchable:
        return {"predictions": [found]}
    rows = next(iter(found.values())).shape[0]
    return {"predictions": [{name: array[row] for name, array in found.items()} for row in range(rows)]}
