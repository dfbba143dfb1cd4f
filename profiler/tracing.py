"""The tracing process: what a model's graph computes, counted operator by operator without computing it.

    python -m profiler.tracing

Lines in: {"format", "source", "sizes"}; lines out: features (`profiler.features.encode`) or {"error": [kind, message]}. It ends at the end of its
input.

The operators are those that torch.export would record, seen as they are dispatched, so that TorchScript and exported programs are counted as
catalogued networks are. Weights and activations stay on the meta device: no memory, no arithmetic. Inputs of whole numbers (tokens) are real, since
networks look at them; a network that looks at an activation cannot be counted, and the error says so.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import msgspec
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from contracts.artifact import Program
from contracts.errors import InvalidArtifact, ProtocolError, SluiceError, to_wire
from contracts.functions import ModelFormat, ModelRef
from models import networks
from models.describe import describe
from models.dtypes import TORCH_DTYPES
from models.load import Loaded, load
from models.program import Executable
from profiler.features import Features, Kind, Work, encode, from_runs

_ROWS = (2, 4)
"""The two runs through which the lines go: more than one row, because kernels treat a dimension of 1 as absent."""
_FREE = frozenset(("empty", "empty_like", "empty_strided", "new_empty", "detach", "lift_fresh", "alias"))
_CONVOLUTIONS = frozenset(("convolution", "mkldnn_convolution", "cudnn_convolution"))
_GATHERS = frozenset(("embedding", "index", "index_select", "gather", "take"))
"""These read of their first argument only what they give."""
_WORDS: Mapping[Kind, str] = {
    "attention": "attention",
    "matmul": "mm addmm bmm baddbmm mv addmv dot",
    "normalisation": "norm",
    "reduction": "sum mean softmax argmax amax amin max min aminmax var std cumsum any all topk pool1d pool2d pool3d",
    "movement": "clone copy cat stack pad pad1d pad2d ones zeros full arange tril triu repeat roll flip fill scalar upsample",
}
"""Kinds by the words in an operator's name, first match; what no word fits is elementwise."""
_FUSED_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default


class Request(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One model; `sizes` fix named dimensions other than the rows, which are as `Loaded.sample` has them otherwise."""

    format: ModelFormat
    source: str
    sizes: dict[str, int] = {}


class Failed(msgspec.Struct, frozen=True):
    """(kind, message) as `contracts.errors.to_wire` gives them."""

    error: tuple[str, str]


def weightless(ref: ModelRef) -> Loaded:
    """The model without the numbers of its weights where the catalogue knows its architecture: nothing large is read then."""
    described = describe(ref)
    if described.config is None:
        return load(ref)
    return Loaded(Executable(networks.construct(described.config), described.signature), Program("catalog", ref.source), b"")


def trace(model: Loaded, sizes: Mapping[str, int]) -> Features:
    """Features of a model, from whose weights this takes the numbers; InvalidTensor for sizes that it does not take."""
    meta = {name: _to_meta(tensor) for name, tensor in model.executable.weights().items()}
    model.executable.bind(meta)
    weights = frozenset(map(_place, meta.values()))
    rows = _ROWS if model.signature.batchable else _ROWS[:1]
    runs = []
    for count in rows:
        inputs = _inputs(model, count, sizes)
        runs.append(_Counter(weights))
        with torch.inference_mode(), runs[-1]:
            model.executable(inputs)
    shapes = model.signature.bind({spec.name: (spec.dtype, inputs[spec.name].shape) for spec in model.signature.inputs})
    named = {name: size for name, size in shapes.items() if name != "batch"}
    return Features(from_runs([run.kinds() for run in runs], rows), runs[0].longest, named)


def answer(line: bytes) -> Features | Failed:
    """The reply to one line; every error becomes part of it."""
    try:
        request = msgspec.json.decode(line, type=Request)
    except msgspec.MsgspecError as error:
        return _failed(ProtocolError(f"a line is no request ({error})"))
    try:
        return trace(weightless(ModelRef(request.format, request.source)), request.sizes)
    except SluiceError as error:
        return _failed(error)
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        return _failed(
            InvalidArtifact(f"its graph cannot be counted without running it ({type(error).__name__}: {reason})", key="model", value=request.source)
        )


def serve(requests: BinaryIO, replies: BinaryIO) -> None:
    """Answers until the input ends."""
    for line in requests:
        reply = answer(line)
        replies.write((encode(reply) if isinstance(reply, Features) else msgspec.json.encode(reply)) + b"\n")
        replies.flush()


def main() -> None:
    """The process. Nothing but replies reaches the reader, whatever a library prints."""
    torch.set_num_threads(1)
    with os.fdopen(os.dup(sys.stdout.fileno()), "wb") as replies:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        serve(sys.stdin.buffer, replies)


@dataclass(slots=True)
class _Sum:
    """The work of one kind so far."""

    kernels: int = 0
    flops: float = 0.0
    bytes: float = 0.0
    weight_bytes: int = 0


class _Counter(TorchDispatchMode):
    """While it is entered, sums up the work of every operator, by kind, and follows the longest chain of kernels through storages.

    A weight belongs to the kind that reads it first.
    """

    def __init__(self, weights: frozenset[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.longest = 0
        self._unread = set(weights)
        self._sums: dict[Kind, _Sum] = {}
        # A storage that dies may leave its address to another, which is noted anew when an operator makes it.
        self._depth: dict[int, int] = {}

    def kinds(self) -> dict[Kind, Work]:
        """The sums so far, as fixed work."""
        return {kind: Work(found.kernels, found.weight_bytes, fixed_flops=found.flops, fixed_bytes=found.bytes) for kind, found in self._sums.items()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs one operator; those that torch writes in terms of others come apart first, but attention, which is one kernel."""
        kwargs = kwargs or {}
        if func is not _FUSED_ATTENTION:
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        call = args, kwargs
        if any(tensor.is_meta for tensor in _tensors(call)):
            call = tree_map_only(Tensor, _to_meta, call)
        result = func(*call[0], **call[1])
        self._note(func, args, kwargs, result)
        return result

    def _note(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        name = func._overloadpacket.__name__
        given, made = _tensors((args, kwargs)), _tensors(result)
        read = set(map(_place, given))
        depth = max((self._depth.get(place, 0) for place in read), default=0)
        if name in _FREE or (made and not func._schema.is_mutable and all(_place(tensor) in read for tensor in made)):
            self._depth |= {_place(tensor): depth for tensor in made}
            return
        self.longest = max(self.longest, depth + 1)
        self._depth |= {_place(tensor): depth + 1 for tensor in made}
        written = sum(map(_size, made))
        distinct = {(_place(tensor), tensor.storage_offset(), tensor.shape): _size(tensor) for tensor in (given[1:] if name in _GATHERS else given)}
        weights = {_place(tensor): tensor.untyped_storage().nbytes() for tensor in given if _place(tensor) in self._unread}
        found = self._sums.setdefault(_kind(name, args), _Sum())
        found.kernels += 1
        found.flops += _flops(func, args, kwargs, result)
        found.bytes += sum(distinct.values()) + written * (2 if name in _GATHERS else 1)
        found.weight_bytes += sum(weights.values())
        self._unread.difference_update(weights)


def _kind(name: str, args: Any) -> Kind:
    if name in _CONVOLUTIONS:
        return "grouped" if args[-1 if name == "convolution" else 6] > 1 else "convolution"
    if name in _GATHERS:
        return "movement"
    words = set(name.split("_"))
    return next((kind for kind, known in _WORDS.items() if words.intersection(known.split())), "elementwise")


def _flops(func: Any, args: Any, kwargs: Any, result: Any) -> float:
    """By the formulas of torch for products; for the rest an operation for each element of the largest tensor, or of the rows that are gathered."""
    if func is _FUSED_ATTENTION:
        return float(sdpa_flop_count(*(tensor.shape for tensor in args[:3])))
    formula = flop_registry.get(func._overloadpacket)
    if formula is not None:
        return float(formula(*args, **kwargs, out_val=result))
    seen = (args[1:], result) if func._overloadpacket.__name__ in _GATHERS else (args, kwargs, result)
    return float(max((tensor.numel() for tensor in _tensors(seen)), default=0))


def _inputs(model: Loaded, rows: int, sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """Whole numbers as real ones, everything else on the meta device."""
    sample = model.sample()
    known = model.signature.bind({spec.name: (spec.dtype, sample[spec.name].shape) for spec in model.signature.inputs})
    chosen = {**known, **sizes, "batch": rows}
    found = {}
    for spec in model.signature.inputs:
        dtype = TORCH_DTYPES[spec.dtype]
        device = "meta" if dtype.is_floating_point else "cpu"
        found[spec.name] = torch.ones([dim if isinstance(dim, int) else chosen[dim] for dim in spec.shape], dtype=dtype, device=device)
    return found


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _to_meta(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_meta else torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _place(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _size(tensor: Tensor) -> int:
    """Bytes that a kernel touches: a broadcast dimension costs nothing."""
    return min(tensor.nbytes, tensor.untyped_storage().nbytes())


def _failed(error: BaseException) -> Failed:
    kind, message, _ = to_wire(error)
    return Failed((kind, message))


if __name__ == "__main__":
    main()
