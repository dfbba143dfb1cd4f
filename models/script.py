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

import msgspec
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
    """A script module as a plain module: input tensors in the signature's order -> output tensors.

    The script module is no submodule of it, since hooks cannot be put inside: the one gate is its entry.
    """

    def __init__(self, script: Any, signature: Signature) -> None:
        super().__init__()
        self._scripts = (script.eval(),)
        self.signature = signature
        self._outputs = tuple(spec.name for spec in signature.outputs)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        with torch.jit.optimized_execution(False):
            result = self._scripts[0](*inputs)
        if isinstance(result, dict):
            return tuple(result[name] for name in self._outputs)
        return (result,) if isinstance(result, Tensor) else tuple(result)

    def slots(self) -> Iterator[tuple[str, _Attributes, str]]:
        """(name, holder, key) of every parameter and buffer, tied names included."""
        for prefix, module in self._scripts[0].named_modules(remove_duplicate=False):
            holder = _Attributes(module._c)
            for table in (module._parameters, module._buffers):
                for key, _ in table.items():
                    yield f"{prefix}.{key}" if prefix else key, holder, key

    def encode(self) -> bytes:
        """The program file: the module with every weight replaced by one element, expanded. The module cannot run afterwards."""
        empty: dict[int, Tensor] = {}
        for _, holder, key in list(self.slots()):
            tensor = holder[key]
            holder[key] = empty.setdefault(tensor.data_ptr(), torch.zeros(1, dtype=tensor.dtype).expand(tensor.shape)) if tensor.dim() else tensor
        buffer = io.BytesIO()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.jit.save(self._scripts[0], buffer)
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


def read(path: Path) -> ScriptProgram:
    """The module of a TorchScript file with a signature beside it (`<name>.signature.json` or `signature.json`: {"inputs": [{name, dtype, shape}], ...})."""
    signature = _signature(path)
    with reading(path):
        _audit(path.read_bytes(), str(path))
        return decode(path.read_bytes(), signature)


def decode(data: bytes, signature: Signature) -> ScriptProgram:
    """A module from an audited file or from a program file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ScriptProgram(torch.jit.load(io.BytesIO(data), map_location="cpu"), signature)


def _signature(path: Path) -> Signature:
    for beside in (path.with_suffix(".signature.json"), path.with_name("signature.json")):
        if beside.is_file():
            with reading(beside):
                return msgspec.json.decode(beside.read_bytes(), type=Signature)
    raise InvalidArtifact("needs a signature beside it, since TorchScript does not record shapes", key="model", value=str(path))


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
