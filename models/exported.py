"""Serves torch.export programs (.pt2) by running their graph directly: no generated code, no eval, no pickle.

torch.export.load (2.13) evaluates shape expressions as Python, resolves call targets by attribute anywhere under `torch`, generates source from names
in the file, executes its guards, and unpickles sample inputs and custom objects: it must not see a file from outside. This module reads the same
archive as data, calls nothing but operators of the aten namespace, and cuts the graph into segments by first use of weights.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import msgspec
import torch
from torch import Tensor, nn

from contracts.errors import InvalidArtifact, InvalidTensor
from models import schema
from models.archive import Archive, reading

_ATEN = re.compile(r"torch\.ops\.aten\.(\w+)\.(\w+)")
_REFUSED = frozenset(("from_file", "_print", "set_", "set", "resize_", "_cudnn_init_dropout_state"))
_OPERATORS = ("add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "eq", "ne", "lt", "le", "gt", "ge", "and_", "or_", "not_")
_ARITHMETIC = {f"_operator.{name}": getattr(operator, name) for name in _OPERATORS}
_ARITHMETIC |= {f"math.{name}": getattr(math, name) for name in ("ceil", "floor", "trunc")}
_ARITHMETIC |= {f"torch.{name}": getattr(torch, name) for name in ("sym_max", "sym_min", "sym_int", "sym_float", "sym_not", "sym_ite")}
_DTYPES = {
    1: torch.uint8,
    2: torch.int8,
    3: torch.int16,
    4: torch.int32,
    5: torch.int64,
    6: torch.float16,
    7: torch.float32,
    8: torch.float64,
    9: torch.complex32,
    10: torch.complex64,
    11: torch.complex128,
    12: torch.bool,
    13: torch.bfloat16,
    28: torch.uint16,
    34: torch.uint32,
    35: torch.uint64,
}
_SAME_VALUES = frozenset(("_to_copy", "alias", "clone", "contiguous", "expand", "flatten", "reshape", "squeeze", "to", "unsqueeze", "view"))
"""Operators whose result holds all values of their first argument and no others."""
_MEMORY_FORMATS = {1: torch.contiguous_format, 2: torch.channels_last, 3: torch.channels_last_3d, 4: torch.preserve_format}
_PLAIN = ("as_int", "as_ints", "as_bool", "as_bools", "as_string", "as_strings")


class _Value(NamedTuple):
    """A place in the environment, in an argument list."""

    name: str


class _Device(NamedTuple):
    """The device that the program runs on, whatever it was exported on."""


class Step(NamedTuple):
    """One call, ready to run. `outputs`: names for the result, one name for it whole or one for each part; `release`: values not needed after it."""

    call: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[str | None, ...]
    parts: bool
    release: tuple[str, ...]


class Segment(nn.Module):
    """Consecutive calls, the first of which is the first to use some weight."""

    def __init__(self, steps: list[Step]) -> None:
        super().__init__()
        self.steps = steps

    def forward(self, values: dict[str, Any], device: torch.device) -> None:
        """Runs the calls over the values so far, and adds theirs."""
        for step in self.steps:
            result = step.call(*_resolve(step.args, values, device), **_resolve_named(step.kwargs, values, device))
            if step.parts:
                values.update((name, part) for name, part in zip(step.outputs, result, strict=True) if name)
            elif step.outputs and step.outputs[0]:
                values[step.outputs[0]] = result
            for name in step.release:
                del values[name]


class ExportedModule(nn.Module):
    """An exported program as a module; `weights` maps names to tensors."""

    def __init__(self, program: schema.Stripped) -> None:
        super().__init__()
        self.program = program
        self.weights: dict[str, Tensor] = {place.weight: torch.empty(0) for place in program.places}
        self.segments = nn.ModuleList(map(Segment, _segments(program)))
        self._dims = [
            (position, axis, str(dim), program.ranges[dim])
            for position, spec in enumerate(program.signature.inputs)
            for axis, dim in enumerate(spec.shape)
            if dim in program.ranges
        ]
        names = [spec.name for spec in program.signature.inputs]
        self._lookups = [(names[position], position, weight) for position, weight in _lookups(program, self.segments)]

    def check(self, *inputs: Tensor) -> None:
        """As models.program.Executable.check: indices that go straight into an embedding table. The weights must be bound."""
        for name, position, weight in self._lookups:
            indices, rows = inputs[position], self.weights[weight].shape[0]
            if not indices.numel():
                continue
            low, high = (int(value) for value in indices.aminmax())
            if low < 0 or high >= rows:
                raise InvalidTensor(f"holds an index outside the table of {rows} rows", key=name, value=low if low < 0 else high)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Input tensors in the signature's order -> output tensors; InvalidTensor when a size lies outside the program's ranges."""
        for position, axis, dim, limits in self._dims:
            size = inputs[position].shape[axis]
            if size < (limits.min_val or 0) or (limits.max_val is not None and size > limits.max_val):
                raise InvalidTensor(f"lies outside what the program was exported for ({limits.min_val} to {limits.max_val})", key=dim, value=size)
        values: dict[str, Any] = {place.graph_name: self.weights[place.weight] for place in self.program.places}
        values |= self.program.constants
        values |= zip(self.program.inputs, inputs, strict=True)
        device = inputs[0].device
        for segment in self.segments:
            segment(values, device)
        return tuple(values[name] for name in self.program.outputs)


def read(path: Path) -> tuple[schema.Stripped, dict[str, Tensor]]:
    """The program of a .pt2 file and its weights; InvalidArtifact names the file when it is broken, foreign, or needs more than data."""
    archive = Archive(path)
    try:
        with reading(path):
            name, program = schema.read(archive, path)
            payloads: dict[str, tuple[str, schema.Payload]] = {}
            for folder, kind in (("data/weights/", "weights"), ("data/constants/", "constants")):
                config = msgspec.json.decode(archive.read(f"{folder}{name}_{kind}_config.json"), type=schema.PayloadConfig)
                payloads |= {weight: (folder, payload) for weight, payload in config.config.items()}
            tensors, first = _weights(archive, payloads)
            stripped = schema.strip(program, first)
            ExportedModule(stripped)
            used = {place.weight for place in stripped.places}
            return stripped, {weight: tensor for weight, tensor in tensors.items() if weight in used}
    finally:
        archive.close()


def decode(data: bytes) -> ExportedModule:
    """A module from the program file that `encode` wrote; its weights are empty until they are bound."""
    return ExportedModule(msgspec.json.decode(data, type=schema.Stripped))


def encode(program: schema.Stripped) -> bytes:
    """A program file."""
    return msgspec.json.encode(program)


def _weights(archive: Archive, payloads: Mapping[str, tuple[str, schema.Payload]]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Distinct tensors by their first name, and that name for every name."""
    records: dict[str, Tensor] = {}
    tensors: dict[str, Tensor] = {}
    first: dict[str, str] = {}
    seen: dict[object, str] = {}
    for weight, (folder, payload) in payloads.items():
        meta = payload.tensor_meta
        if payload.use_pickle or meta is None or not re.fullmatch(r"(weight|tensor)_\d+", payload.path_name):
            raise InvalidArtifact("is a pickled object; only plain tensors are served", key=weight, value=payload.path_name)
        record, dtype = folder + payload.path_name, _DTYPES[meta.dtype]
        place = (record, meta.dtype, meta.static("sizes"), meta.static("strides"), schema.number(meta.storage_offset))
        first[weight] = seen.setdefault(place, weight)
        if first[weight] != weight:
            continue
        if record not in records:
            records[record] = torch.empty(archive.size(record), dtype=torch.uint8)
            archive.read_into(record, memoryview(records[record].numpy()))  # type: ignore[arg-type]
        flat = records[record].view(dtype)
        tensors[weight] = torch.as_strided(flat, place[2], place[3], place[4]).contiguous()
    return tensors, first


def _segments(program: schema.Stripped) -> list[list[Step]]:
    """The graph's calls, a new segment before each that is the first to use some weight."""
    weights = {place.graph_name: place.weight for place in program.places}
    arguments = [[(item, _argument(item.arg)) for item in node.inputs] for node in program.graph.nodes]
    last: dict[str, int] = {}
    for position, items in enumerate(arguments):
        last |= {name: position for _, value in items for name in _names(value)}
    kept = {*weights, *program.constants, *program.inputs, *program.outputs}
    segments: list[list[Step]] = [[]]
    used: set[str] = set()
    shared = {*weights, *program.inputs}
    for position, (node, items) in enumerate(zip(program.graph.nodes, arguments, strict=True)):
        names = {name for _, value in items for name in _names(value)}
        fresh = {weights[name] for name in names if name in weights} - used
        if fresh and segments[-1]:
            segments.append([])
        used |= fresh
        outputs = _outputs(node)
        call = _target(node.target)
        shared |= _aliases(call, items, shared, outputs)
        dead = {name for name in (*names, *filter(None, outputs)) if last.get(name, position) == position} - kept
        segments[-1].append(
            Step(
                call=call,
                args=tuple(value for item, value in items if item.kind != 2),
                kwargs={item.name: value for item, value in items if item.kind == 2},
                outputs=outputs,
                parts=len(outputs) > 1 or "as_tensors" in (node.outputs[0] if node.outputs else ()),
                release=tuple(sorted(dead)),
            )
        )
    return segments


def _lookups(program: schema.Stripped, segments: Iterable[nn.Module]) -> list[tuple[int, str]]:
    """(position of an input, weight) wherever an input's own values are indices into an embedding table."""
    weights = {place.graph_name: place.weight for place in program.places}
    origin = {name: position for position, name in enumerate(program.inputs)}
    found: list[tuple[int, str]] = []
    for step in (step for segment in segments for step in cast(Segment, segment).steps):
        operator_name = step.call._schema.name.removeprefix("aten::") if isinstance(step.call, torch._ops.OpOverload) else ""
        names = [arg.name if type(arg) is _Value else "" for arg in step.args]
        if operator_name == "embedding" and names[0] in weights and names[1] in origin:
            found.append((origin[names[1]], weights[names[0]]))
        elif operator_name in _SAME_VALUES and names and names[0] in origin and step.outputs[0]:
            origin[step.outputs[0]] = origin[names[0]]
    return list(dict.fromkeys(found))


def _aliases(call: Callable[..., Any], items: list[tuple[schema.Input, Any]], shared: set[str], outputs: tuple[str | None, ...]) -> set[str]:
    """Results that may be views of weights or inputs; InvalidArtifact when the call would write to one."""
    touched: set[str] = set()
    if isinstance(call, torch._ops.OpOverload):
        by_name = {argument.name: argument for argument in call._schema.arguments}
        for item, value in items:
            info = by_name[item.name].alias_info
            if info is not None and shared.intersection(_names(value)):
                if info.is_write:
                    raise InvalidArtifact("writes to its weights or its inputs", key="target", value=str(call))
                touched.update(filter(None, outputs))
        if call.namespace == "aten" and not touched and any(shared.intersection(_names(value)) for _, value in items) and _may_view(call):
            touched.update(filter(None, outputs))
    return touched


def _may_view(call: torch._ops.OpOverload) -> bool:
    """Operators whose schema does not say that they may return their own argument: reshape, contiguous, to and their like."""
    return bool(call._schema.name.removeprefix("aten::") in ("reshape", "contiguous", "to", "flatten", "dropout", "type_as", "expand_as", "view_as"))


def _target(target: str) -> Callable[..., Any]:
    match = _ATEN.fullmatch(target)
    if match and match[1] not in _REFUSED:
        overload = getattr(getattr(torch.ops.aten, match[1], None), match[2], None)
        if isinstance(overload, torch._ops.OpOverload):
            return overload
    if target in _ARITHMETIC:
        return cast(Callable[..., Any], _ARITHMETIC[target])
    raise InvalidArtifact("is no operator that is served (aten operators are)", key="target", value=target)


def _outputs(node: schema.Node) -> tuple[str | None, ...]:
    found: list[str | None] = []
    for output in node.outputs:
        kind, value = next(iter(output.items()))
        if kind == "as_tensors":
            found.extend(item["name"] for item in value)
        elif kind == "as_none":
            found.append(None)
        else:
            found.append(value["name"] if kind == "as_tensor" else value["as_name"])
    return tuple(found)


def _argument(arg: schema.Argument) -> Any:
    """A plain value, or one with `_Value` and `_Device` where the run fills them in."""
    kind, value = next(iter(arg.items()))
    if kind in _PLAIN:
        return value
    match kind:
        case "as_none":
            return None
        case "as_float":
            return float(value)  # the schema writes infinities and NaN as text
        case "as_floats":
            return [float(item) for item in value]
        case "as_tensor":
            return _Value(value["name"])
        case "as_tensors":
            return [_Value(item["name"]) for item in value]
        case "as_sym_int" | "as_sym_float" | "as_sym_bool":
            return _symbolic(value)
        case "as_sym_ints" | "as_sym_floats" | "as_sym_bools":
            return [_symbolic(item) for item in value]
        case "as_optional_tensors" | "as_optional_tensor":
            items = [_Value(item["as_tensor"]["name"]) if "as_tensor" in item else None for item in (value if isinstance(value, list) else [value])]
            return items if kind == "as_optional_tensors" else items[0]
        case "as_scalar_type":
            return _DTYPES[value]
        case "as_memory_format":
            return _MEMORY_FORMATS[value]
        case "as_layout" if value == 7:
            return torch.strided
        case "as_device":
            return _Device()
    raise InvalidArtifact("is an argument that is not served", key="arg", value=kind)


def _symbolic(value: dict[str, Any]) -> Any:
    kind, inner = next(iter(value.items()))
    return _Value(inner) if kind == "as_name" else float(inner) if kind == "as_float" else inner


def _names(value: Any) -> list[str]:
    if type(value) is _Value:
        return [value.name]
    return [item.name for item in value if type(item) is _Value] if type(value) is list else []


def _resolve(args: tuple[Any, ...], values: dict[str, Any], device: torch.device) -> list[Any]:
    return [_fill(arg, values, device) for arg in args]


def _resolve_named(kwargs: dict[str, Any], values: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {name: _fill(arg, values, device) for name, arg in kwargs.items()} if kwargs else kwargs


def _fill(arg: Any, values: dict[str, Any], device: torch.device) -> Any:
    kind = type(arg)
    if kind is _Value:
        return values[arg.name]
    if kind is list:
        return [values[item.name] if type(item) is _Value else item for item in arg]
    return device if kind is _Device else arg
