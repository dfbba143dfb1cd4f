"""What a loaded model is, outside torch: its signature, where its weights lie in one contiguous file, and when a run first needs which of them.

`models` writes a WeightIndex beside each weight file in the host store, the node agent reads sizes and signature from it, a lane worker the rest.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

import msgspec

from contracts.errors import InvalidArtifact, InvalidTensor

ALIGNMENT = 256
"""Every tensor starts at a multiple of this, in bytes."""

DTYPE_BYTES: Mapping[str, int] = {
    "BOOL": 1,
    "UINT8": 1,
    "UINT16": 2,
    "UINT32": 4,
    "UINT64": 8,
    "INT8": 1,
    "INT16": 2,
    "INT32": 4,
    "INT64": 8,
    "FP16": 2,
    "FP32": 4,
    "FP64": 8,
    "BF16": 2,
}
"""Bytes an element takes, by its Open Inference Protocol name."""


TEXT = "BYTES"
"""The datatype of a text input. No model takes one: the front makes token inputs of it, so it never lies in a segment."""


class TensorSpec(msgspec.Struct, frozen=True):
    """One input or output. A dimension is a size or a name; a name means one size throughout the signature, "batch" being the rows.

    `pad` fills an input up where a padded dimension is longer in the batch than in the request.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    pad: int | None = None


class Text(msgspec.Struct, frozen=True):
    """A model that also takes text: the input `name`, one text a row, instead of its token inputs.

    `tokenizer` is a file of the host store (`<digest>.tokenizer`, in the format of the `tokenizers` library). Texts are cut to `max_tokens`, and
    padded to `min_tokens` where the model takes no fewer.
    """

    tokenizer: str
    max_tokens: int
    min_tokens: int = 1
    name: str = "text"


class Signature(msgspec.Struct, frozen=True):
    """What a model takes and gives. `batchable`: rows of several requests may run as one batch (dimension 0 of every tensor is "batch").

    `padded` are named dimensions in which requests of one batch may differ: longer inputs change nothing in the answer, as far as it is asked for.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    batchable: bool = True
    padded: tuple[str, ...] = ()
    text: Text | None = None

    @property
    def accepts(self) -> tuple[TensorSpec, ...]:
        """What a request may bring: the inputs, and the text that may stand for them."""
        return self.inputs if self.text is None else (*self.inputs, TensorSpec(self.text.name, TEXT, ("batch", 1)))

    def bind(self, shapes: Mapping[str, tuple[str, Sequence[int]]]) -> dict[str, int]:
        """Sizes of the named dimensions, from input name -> (dtype, shape); InvalidTensor names what does not fit."""
        sizes: dict[str, int] = {}
        known = {spec.name: spec for spec in self.inputs}
        for name in shapes:
            if name not in known:
                raise InvalidTensor(f"is no input of this model (inputs: {', '.join(known)})", key="inputs", value=name)
        for name, spec in known.items():
            if name not in shapes:
                raise InvalidTensor("an input is missing", key="inputs", value=name)
            dtype, shape = shapes[name]
            if dtype != spec.dtype:
                raise InvalidTensor(f"datatype must be {spec.dtype}", key=name, value=dtype)
            if len(shape) != len(spec.shape) or not all(_fits(want, got, sizes) for want, got in zip(spec.shape, shape, strict=True)):
                raise InvalidTensor(f"shape must fit {list(spec.shape)}", key=name, value=list(shape))
        return sizes

    def output_shapes(self, sizes: Mapping[str, int]) -> list[tuple[TensorSpec, tuple[int, ...], int]]:
        """(spec, shape, bytes) of every output, for named dimensions as `bind` returned them."""
        found = []
        for spec in self.outputs:
            shape = tuple(sizes[dim] if isinstance(dim, str) else dim for dim in spec.shape)
            found.append((spec, shape, math.prod(shape) * DTYPE_BYTES[spec.dtype]))
        return found


def _fits(want: int | str, got: int, sizes: dict[str, int]) -> bool:
    if isinstance(want, int):
        return want == got
    return got >= 1 and sizes.setdefault(want, got) == got


class TensorEntry(msgspec.Struct, frozen=True):
    """One weight: `dtype` is torch's name without the prefix ("float32"), `offset` counts from the start of the file, in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class Gate(msgspec.Struct, frozen=True):
    """A point in a run, the entry of a submodule ("" is the model itself), where the first `need_bytes` of the weights must have arrived.

    Gates are listed in the order in which a run passes them, each submodule once; `need_bytes` never falls.
    """

    module: str
    need_bytes: int


class Program(msgspec.Struct, frozen=True):
    """What runs, without its weights. Functions with equal programs share one module in a lane.

    `kind` "catalog": `source` is the architecture's name and `config` its arguments as JSON; "torch-export" and "torchscript": `source` is the name
    of the program file in the host store (`<digest>.program`).
    """

    kind: str
    source: str
    config: str = "{}"


class WeightIndex(msgspec.Struct, frozen=True):
    """A model in the host store: `<digest>.weights` holds `total_bytes`, this stands beside it as `<digest>.json`.

    `run_ns` is the time of one warm run of one row when the layout was recorded: the scheduler's first estimate.
    """

    digest: str
    total_bytes: int
    tensors: tuple[TensorEntry, ...]
    gates: tuple[Gate, ...]
    program: Program
    signature: Signature
    run_ns: int
    version: int = 1

    @property
    def program_id(self) -> str:
        """Equal for models that differ only in their weights."""
        return f"{self.program.kind}:{self.program.source}:{self.program.config}"


_TORCH_BYTES: Mapping[str, int] = {
    "bool": 1,
    "uint8": 1,
    "uint16": 2,
    "uint32": 4,
    "uint64": 8,
    "int8": 1,
    "int16": 2,
    "int32": 4,
    "int64": 8,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "float16": 2,
    "bfloat16": 2,
    "float32": 4,
    "float64": 8,
    "complex64": 8,
    "complex128": 16,
}
_FILE_NAME = re.compile(r"[0-9A-Za-z_][0-9A-Za-z_.-]{0,127}")
_TOKENIZER_NAME = re.compile(r"[0-9a-f]{64}\.tokenizer")


def decode_index(data: bytes) -> WeightIndex:
    """A WeightIndex from its JSON; InvalidArtifact if it is torn, foreign or inconsistent."""
    try:
        index = msgspec.json.decode(data, type=WeightIndex)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidArtifact(f"is no weight index ({error})", key="index", value=data[:80]) from None
    if index.version != 1:
        raise InvalidArtifact("must be 1: written by another version of Sluice", key="index.version", value=index.version)
    _check_names(index)
    end = 0
    for tensor in index.tensors:
        if tensor.offset % ALIGNMENT or tensor.offset < end or tensor.nbytes != _nbytes(tensor):
            raise InvalidArtifact("lies outside its place", key=f"index.tensors.{tensor.name}", value=(tensor.offset, tensor.nbytes))
        end = tensor.offset + tensor.nbytes
    needs = [0, *(gate.need_bytes for gate in index.gates), index.total_bytes]
    if end > index.total_bytes or needs != sorted(needs) or not index.gates:
        raise InvalidArtifact("is inconsistent", key="index", value=index.digest)
    _check_signature(index.signature)
    return index


def _check_names(index: WeightIndex) -> None:
    """What becomes a file name in the host store must not lead out of it."""
    names = {"digest": index.digest}
    if index.program.kind != "catalog":
        names["program.source"] = index.program.source
    for key, name in names.items():
        if not _FILE_NAME.fullmatch(name):
            raise InvalidArtifact("must be a plain file name", key=f"index.{key}", value=name)


def _nbytes(tensor: TensorEntry) -> int:
    """The bytes its dtype and shape ask for; -1 where there is no such tensor."""
    if tensor.dtype not in _TORCH_BYTES or any(size < 0 for size in tensor.shape):
        return -1
    return math.prod(tensor.shape) * _TORCH_BYTES[tensor.dtype]


def _check_signature(signature: Signature) -> None:
    given = {dim for spec in signature.inputs for dim in spec.shape}
    for spec in signature.inputs + signature.outputs:
        if spec.dtype not in DTYPE_BYTES or any(isinstance(dim, int) and dim < 0 for dim in spec.shape):
            raise InvalidArtifact("has a dtype or shape that there is not", key=f"index.signature.{spec.name}", value=(spec.dtype, spec.shape))
    for spec in signature.outputs:
        unknown = [dim for dim in spec.shape if isinstance(dim, str) and dim not in given]
        if unknown:
            raise InvalidArtifact("its size follows from no input", key=f"index.signature.{spec.name}", value=unknown)
    _check_padding(signature)
    text = signature.text
    if text is not None:
        if not _TOKENIZER_NAME.fullmatch(text.tokenizer) or not 1 <= text.min_tokens <= text.max_tokens or not signature.batchable:
            raise InvalidArtifact("is no text input that there can be", key="index.signature.text", value=text)
        if any(spec.name == text.name for spec in signature.inputs):
            raise InvalidArtifact("is the name of another input", key="index.signature.text", value=text.name)


def _check_padding(signature: Signature) -> None:
    """Every input that has a padded dimension must say what fills it."""
    for dim in signature.padded:
        inputs = [spec for spec in signature.inputs if dim in spec.shape]
        if not inputs or dim == "batch" or not signature.batchable:
            raise InvalidArtifact("is no dimension that can be padded", key="index.signature.padded", value=dim)
        for spec in inputs:
            if spec.pad is None or not _holds(spec.dtype, spec.pad):
                raise InvalidArtifact(f"must say with which {spec.dtype} it is padded", key=f"index.signature.{spec.name}", value=spec.pad)


def _holds(dtype: str, value: int) -> bool:
    """Whether an element of a datatype can be exactly this whole number, as far as anybody pads with it."""
    bits = 8 * DTYPE_BYTES[dtype]
    if dtype == "BOOL":
        return value in (0, 1)
    if dtype.startswith("UINT"):
        return 0 <= value < 1 << bits
    return -(1 << (bits - 1)) <= value < 1 << (bits - 1) if dtype.startswith("INT") else abs(value) <= 256
