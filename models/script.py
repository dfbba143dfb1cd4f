"""Serves TorchScript files: audited as text before torch sees them, run without the optimising executor so that every run gives the same bits.

A TorchScript archive holds no Python pickles (torch's own C++ reader builds only script types), but its code may call any registered operator,
and loading runs `__setstate__`. Names of operators that reach files, other processes or native classes are refused before loading.
"""

from __future__ import annotations

import ast
import io
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from contracts.artifact import Signature
from contracts.errors import InvalidArtifact
from contracts.units import MIB
from models.archive import reading

_REFUSED = frozenset(
    ("save", "load", "from_file", "fork", "wait", "awaitable", "classes", "rpc_async", "rpc_sync", "rpc_remote", "manual_seed", "set_num_threads")
)
_MAX_CODE_BYTES = 16 * MIB
_MAX_PROGRAM_BYTES = 4 * MIB


class ScriptProgram(nn.Module):
    """A script module as a plain module.

    The script module is no submodule of it, since hooks cannot be put inside: the one gate is its entry.
    """

    def __init__(self, script: Any, signature: Signature) -> None:
        super().__init__()
        self._scripts = (script.eval(),)
        self.signature = signature
        self._outputs = tuple(spec.name for spec in signature.outputs)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Input tensors in the signature's order -> output tensors."""
        with torch.jit.optimized_execution(False):  # type: ignore[attr-defined]
            result = self._scripts[0](*inputs)
        if isinstance(result, dict):
            return tuple(result[name] for name in self._outputs)
        return (result,) if isinstance(result, Tensor) else tuple(result)

    def slots(self) -> Iterator[tuple[str, _Attributes, str]]:
        """(name, holder, key) of every parameter and buffer, tied names included."""
        for prefix, module in self._scripts[0].named_modules(remove_duplicate=False):
            holder = _Attributes(module._c)
            for table in (module._parameters, module._buffers):
                for key, _ in table.items():  # noqa: PERF102 - a table of torch's own, which yields nothing when iterated
                    yield f"{prefix}.{key}" if prefix else key, holder, key

    def encode(self) -> bytes:
        """The program file: the module with every weight replaced by one element, expanded; tied weights stay tied."""
        weights = [(holder, key, holder[key]) for _, holder, key in self.slots()]
        empty: dict[object, Tensor] = {}
        for holder, key, tensor in weights:
            holder[key] = empty.setdefault(place_of(tensor), torch.zeros((), dtype=tensor.dtype).expand(tensor.shape))
        buffer = io.BytesIO()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.jit.save(self._scripts[0], buffer)
        for holder, key, tensor in weights:
            holder[key] = tensor
        if buffer.tell() > _MAX_PROGRAM_BYTES:
            raise InvalidArtifact(
                "keeps its weights outside parameters and buffers (save it before it is frozen)", key="program bytes", value=buffer.tell()
            )
        return buffer.getvalue()


class _Attributes:
    """Attributes of one script module, by name."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def __getitem__(self, key: str) -> Tensor:
        return cast(Tensor, self._module.getattr(key))

    def __setitem__(self, key: str, tensor: Tensor) -> None:
        self._module.setattr(key, tensor)


def place_of(tensor: Tensor) -> object:
    """Equal for tied tensors: a script module hands out a new Python object for the same tensor each time."""
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def read(path: Path, signature: Signature) -> ScriptProgram:
    """The module of a TorchScript file; InvalidArtifact names the file when it is broken, foreign, or calls for more than tensor operators."""
    with reading(path):
        data = path.read_bytes()
        _audit(data, str(path))
        return decode(data, signature)


def tensors(path: Path) -> dict[str, Tensor]:
    """The weights of a TorchScript file, by name, for a network of the catalogue."""
    program = read(path, Signature((), ()))
    return {name: holder[key] for name, holder, key in program.slots()}


def decode(data: bytes, signature: Signature) -> ScriptProgram:
    """A module from an audited file or from a program file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ScriptProgram(torch.jit.load(io.BytesIO(data), map_location="cpu"), signature)


def _audit(data: bytes, source: str) -> None:
    """Refuses archives that call for more than tensor operators; ValueError and its like for what is no archive."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        infos = archive.infolist()
        code = [info for info in infos if "/code/" in info.filename]
        if len({info.filename for info in infos}) != len(infos) or sum(info.file_size for info in code) > _MAX_CODE_BYTES:
            raise InvalidArtifact("is no archive that torch.jit.save wrote", key="model", value=source)
        if any(info.compress_type != zipfile.ZIP_STORED for info in infos if info not in code):
            raise InvalidArtifact("has compressed weights, which torch.jit.save never writes", key="model", value=source)
        for info in infos:
            content = archive.read(info)
            if info.filename.endswith(".pkl") and b"torch.classes" in content:
                raise InvalidArtifact("holds an object of a native class", key="model", value=source)
            if info.filename.endswith(".py"):
                _audit_code(content.decode(), source)


def _audit_code(text: str, source: str) -> None:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and node.name in ("__setstate__", "__getstate__"):
            raise InvalidArtifact(f"runs code when it is loaded ({node.name})", key="model", value=source)
        if isinstance(node, ast.Attribute):
            root = node.value
            foreign = isinstance(root, ast.Name) and root.id == "ops" and node.attr not in ("prim", "aten")
            if foreign or node.attr in _REFUSED:
                raise InvalidArtifact(f"calls {node.attr}, which is no operator that is served", key="model", value=source)
