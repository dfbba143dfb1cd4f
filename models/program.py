"""A model that runs: a module whose weights are bound from outside.

Owns the one way in which a program runs, so that the reference (`models.load`) and a lane run exactly the same thing. Holds no weights of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

import msgspec
from blake3 import blake3
from torch import Tensor, nn

from contracts.artifact import Program, Signature, WeightIndex
from contracts.errors import ExecutionError, InvalidArtifact
from models import catalogue, exported, networks, script
from models.archive import reading

_PROGRAM_FILE = re.compile(r"([0-9a-f]{64})\.program")


class _Holder(Protocol):
    def __getitem__(self, key: str, /) -> Tensor | None: ...
    def __setitem__(self, key: str, tensor: Tensor, /) -> None: ...


class Executable:
    """A module, its signature, and the places where its weights go. Tied weights have one name: that of their first place."""

    def __init__(self, module: nn.Module, signature: Signature) -> None:
        self.module = module
        self.signature = signature
        self._places: list[tuple[str, _Holder, str]] = []
        self._inputs = tuple(spec.name for spec in signature.inputs)
        self._outputs = tuple(spec.name for spec in signature.outputs)
        first: dict[object, str] = {}
        for name, holder, key in _places(module):
            if (tensor := holder[key]) is not None:
                identity = script.place_of(tensor) if isinstance(module, script.ScriptProgram) else id(tensor)
                self._places.append((first.setdefault(identity, name), holder, key))

    def bind(self, tensors: Mapping[str, Tensor]) -> None:
        """Puts tensors, by name, in the place of all weights; InvalidArtifact names one that is missing. Costs about 100 ns a tensor."""
        try:
            for name, holder, key in self._places:
                holder[key] = tensors[name]
        except KeyError as error:
            raise InvalidArtifact("is missing", key="weight", value=error.args[0]) from None

    def weights(self) -> dict[str, Tensor]:
        """The bound weights, by name."""
        return {name: tensor for name, holder, key in self._places if (tensor := holder[key]) is not None}

    def check(self, inputs: Mapping[str, Tensor]) -> None:
        """InvalidTensor for values that the module cannot take.

        Call it with host tensors before a run on a GPU, where the module does not look itself: the host would have to wait for the device.
        """
        check = getattr(self.module, "check", None)
        if check is not None:
            check(*(inputs[name] for name in self._inputs))

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Outputs by name, from inputs by name. Call it under torch.inference_mode()."""
        result = self.module(*(inputs[name] for name in self._inputs))
        outputs = (result,) if isinstance(result, Tensor) else result
        if len(outputs) != len(self._outputs):
            raise ExecutionError(f"the model gave {len(outputs)} outputs, its signature names {len(self._outputs)}")
        return dict(zip(self._outputs, outputs, strict=True))


def build(index: WeightIndex, store: Path) -> Executable:
    """The executable of a model in the host store, its weights not yet bound and taking no memory; InvalidArtifact when its program is broken."""
    program = index.program
    if program.kind == "catalog":
        with reading(store / f"{index.digest}.json"):
            arguments = msgspec.json.decode(program.config, type=dict[str, object])
        return Executable(networks.construct(catalogue.configure(program.source, arguments, index.digest)), index.signature)
    data = _program_file(program, store)
    with reading(store / program.source):
        if program.kind == "torch-export":
            return Executable(exported.decode(data), index.signature)
        if program.kind == "torchscript":
            return Executable(script.decode(data, index.signature), index.signature)
    raise InvalidArtifact("is no kind of program", key="program.kind", value=program.kind)


def _program_file(program: Program, store: Path) -> bytes:
    match = _PROGRAM_FILE.fullmatch(program.source)
    if match is None:
        raise InvalidArtifact("is no name of a program file", key="program.source", value=program.source)
    with reading(store / program.source):
        data = (store / program.source).read_bytes()
    if blake3(data).hexdigest() != match[1]:
        raise InvalidArtifact("does not match its name: the file is damaged", key="program.source", value=program.source)
    return data


def _places(module: nn.Module) -> Iterable[tuple[str, _Holder, str]]:
    if isinstance(module, script.ScriptProgram):
        return module.slots()
    if isinstance(module, exported.ExportedModule):
        return ((name, module.weights, name) for name in module.weights)
    return (
        (f"{path}.{key}" if path else key, table, key)
        for path, owner in module.named_modules()
        for table in (owner._parameters, owner._buffers)
        for key in table
    )
