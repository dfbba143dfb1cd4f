"""The part of torch.export's file schema (major version 8) that serving needs, as typed values. Imports no torch.

Owns the reading of a program's JSON: graph, signature, shapes. Stack traces, guards and module names are not read, so they can neither
execute nor leak.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from contracts.artifact import Signature, TensorSpec
from contracts.errors import InvalidArtifact
from models.archive import Archive

MAJOR = 8
Argument = dict[str, Any]
"""One key, the kind ("as_tensor", "as_int", ...), and its value."""

_SYMBOL = re.compile(r"Symbol\('(\w+)'(?:, \w+=\w+)*\)|(\w+)")
_DTYPES = {1: "UINT8", 2: "INT8", 3: "INT16", 4: "INT32", 5: "INT64", 6: "FP16", 7: "FP32", 8: "FP64", 12: "BOOL", 13: "BF16"}
_DTYPES |= {28: "UINT16", 34: "UINT32", 35: "UINT64"}


class Named(msgspec.Struct, frozen=True):
    """A tensor by its name in the graph."""

    name: str


class Meta(msgspec.Struct, frozen=True):
    """A tensor's metadata; sizes are {"as_int": n} or {"as_expr": {"expr_str": text}}."""

    dtype: int
    sizes: tuple[dict[str, Any], ...]
    strides: tuple[dict[str, Any], ...]
    storage_offset: dict[str, Any]

    def static(self, field: str) -> tuple[int, ...]:
        """Sizes or strides that must be plain numbers."""
        return tuple(number(size) for size in getattr(self, field))


class Input(msgspec.Struct, frozen=True):
    """One argument of a node; `kind` 2 is a keyword."""

    name: str
    arg: Argument
    kind: int | None = None


class Node(msgspec.Struct, frozen=True):
    """One call."""

    target: str
    inputs: tuple[Input, ...]
    outputs: tuple[Argument, ...]


class Graph(msgspec.Struct, frozen=True):
    """Straight-line code."""

    nodes: tuple[Node, ...]
    tensor_values: dict[str, Meta]


class GraphSignature(msgspec.Struct, frozen=True):
    """What the graph's inputs and outputs are: each a one-key mapping from kind to details."""

    input_specs: tuple[dict[str, Any], ...]
    output_specs: tuple[dict[str, Any], ...]


class CallSignature(msgspec.Struct, frozen=True):
    """The structure of the outputs, as text."""

    out_spec: str


class ModuleCall(msgspec.Struct, frozen=True):
    """A module of the exported model; the first is the model itself."""

    fqn: str
    signature: CallSignature | None = None


class GraphModule(msgspec.Struct, frozen=True):
    """The graph and what it means."""

    graph: Graph
    signature: GraphSignature
    module_call_graph: tuple[ModuleCall, ...]


class Range(msgspec.Struct, frozen=True):
    """The sizes a symbol may take, both ends included."""

    min_val: int | None = None
    max_val: int | None = None


class Version(msgspec.Struct, frozen=True):
    """The schema's version."""

    major: int
    minor: int


class ExportedProgram(msgspec.Struct, frozen=True):
    """A program as `models/*.json` of a .pt2 file holds it."""

    graph_module: GraphModule
    range_constraints: dict[str, Range]
    schema_version: Version


class Payload(msgspec.Struct, frozen=True):
    """Where a weight lies: the record, and the tensor in it."""

    path_name: str
    use_pickle: bool
    tensor_meta: Meta | None


class PayloadConfig(msgspec.Struct, frozen=True):
    """Weights, or constants, by name."""

    config: dict[str, Payload]


class Place(msgspec.Struct, frozen=True):
    """A graph input that is a weight: the name in the graph and the weight's own."""

    graph_name: str
    weight: str


class Stripped(msgspec.Struct, frozen=True):
    """A program without its weights: what the host store keeps. `places` name each tensor once, so tied weights share a name."""

    graph: Graph
    places: tuple[Place, ...]
    signature: Signature
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    constants: dict[str, bool | int | float | str | None]
    ranges: dict[str, Range]


def number(size: dict[str, Any]) -> int:
    """A size that must be a plain number; ValueError otherwise."""
    value = size.get("as_int")
    if type(value) is not int:
        raise ValueError(f"a weight's size is no number: {size}")
    return value


def read(archive: Archive, path: Path) -> tuple[str, ExportedProgram]:
    """The program of a .pt2 archive and the name it has there."""
    models = [name for name in archive.names() if re.fullmatch(r"models/\w+\.json", name)]
    if len(models) != 1 or archive.read("archive_format") != b"pt2":
        raise InvalidArtifact("is no archive of one exported program", key="model", value=str(path))
    program = msgspec.json.decode(archive.read(models[0]), type=ExportedProgram)
    _check(program)
    return models[0].removeprefix("models/").removesuffix(".json"), program


def strip(program: ExportedProgram, first: Mapping[str, str] | None = None) -> Stripped:
    """The program alone. `first` gives the one name of each weight that has several; without it every name stands for itself."""
    places: list[Place] = []
    constants: dict[str, bool | int | float | str | None] = {}
    inputs: list[str] = []
    keys = {"parameter": "parameter_name", "buffer": "buffer_name", "tensor_constant": "tensor_constant_name"}
    for spec in program.graph_module.signature.input_specs:
        kind, details = next(iter(spec.items()))
        if kind in keys:
            weight = details[keys[kind]]
            places.append(Place(details["arg"]["name"], first[weight] if first is not None else weight))
        elif kind == "constant_input":
            constants[details["name"]] = None if "as_none" in details["value"] else next(iter(details["value"].values()))
        elif kind == "user_input" and "as_tensor" in details["arg"]:
            inputs.append(details["arg"]["as_tensor"]["name"])
        else:
            raise InvalidArtifact("has an input that is no tensor", key="input_specs", value=kind)
    outputs = [spec["user_output"]["arg"]["as_tensor"]["name"] for spec in program.graph_module.signature.output_specs]
    names = _output_names(program, len(outputs))
    if not inputs or not outputs:
        raise InvalidArtifact("must take and give at least one tensor", key="input_specs", value=len(inputs))
    found, ranges = _signature(program, inputs, names, outputs)
    return Stripped(program.graph_module.graph, tuple(places), found, tuple(inputs), tuple(outputs), constants, ranges)


def _check(program: ExportedProgram) -> None:
    """Refuses another schema, and programs that keep state from one request to the next."""
    if program.schema_version.major != MAJOR:
        raise InvalidArtifact(
            f"was exported with another schema (torch 2.13 writes {MAJOR})", key="schema_version", value=program.schema_version.major
        )
    for spec in program.graph_module.signature.output_specs:
        kind = next(iter(spec), "")
        if kind != "user_output":
            raise InvalidArtifact("has an output that is no tensor for the caller, such as a changed buffer", key="output_specs", value=kind)


def _signature(program: ExportedProgram, inputs: Sequence[str], names: Sequence[str], outputs: Sequence[str]) -> tuple[Signature, dict[str, Range]]:
    """The signature, from the graph's input and output tensors, and the ranges of its named dimensions.

    The symbol that stands first in every shape becomes "batch"; without one the model is not batchable.
    """
    values = program.graph_module.graph.tensor_values
    shapes = {name: tuple(map(_dimension, values[name].sizes)) for name in (*inputs, *outputs)}
    first = {shape[0] if shape else 1 for shape in shapes.values()}
    batch = next(iter(first)) if len(first) == 1 else None
    batchable = isinstance(batch, str)
    known = {dim for name in inputs for dim in shapes[name]}

    def spec(public: str, name: str) -> TensorSpec:
        for dim in shapes[name]:
            if isinstance(dim, str) and dim not in known:
                raise InvalidArtifact("has an output dimension that is computed from the inputs' (name it by one of theirs)", key=public, value=dim)
        dims = tuple("batch" if batchable and dim == batch else dim for dim in shapes[name])
        return TensorSpec(public, _dtype(values[name].dtype), dims)

    named = Signature(
        inputs=tuple(spec(name, name) for name in inputs),
        outputs=tuple(spec(public, name) for public, name in zip(names, outputs, strict=True)),
        batchable=batchable,
    )
    ranges = {
        ("batch" if batchable and symbol == batch else symbol): limits for symbol, limits in program.range_constraints.items() if symbol in known
    }
    return named, ranges


def _output_names(program: ExportedProgram, count: int) -> tuple[str, ...]:
    """A dictionary's keys where the model returned a flat dictionary, "output" for one tensor, else "output_0" and so on."""
    call = program.graph_module.module_call_graph[0].signature if program.graph_module.module_call_graph else None
    if call is not None:
        _, tree = json.loads(call.out_spec)
        keys = json.loads(tree["context"]) if tree["type"] == "builtins.dict" else None
        if isinstance(keys, list) and len(set(keys)) == count and all(isinstance(key, str) and key for key in keys):
            return tuple(keys)
    return ("output",) if count == 1 else tuple(f"output_{position}" for position in range(count))


def _dimension(size: dict[str, Any]) -> int | str:
    if type(size.get("as_int")) is int:
        return int(size["as_int"])
    text = str(size["as_expr"]["expr_str"])
    match = _SYMBOL.fullmatch(text)
    return (match[1] or match[2]) if match else text


def _dtype(code: int) -> str:
    if code not in _DTYPES:
        raise InvalidArtifact("has an input or output of a type that no protocol carries", key="dtype", value=code)
    return _DTYPES[code]
