"""Loads a model from where it is kept: the unswapped reference that every served answer must equal.

Owns the choice of reader by format. Never executes anything that came with a model: catalogued architectures are Sluice's own code, exported programs
are interpreted, TorchScript is audited, safetensors holds numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import torch
from blake3 import blake3
from safetensors import safe_open
from torch import Tensor, nn

from contracts.artifact import Program, Signature
from contracts.errors import InvalidArtifact
from contracts.functions import ModelFormat, ModelRef
from models import catalogue, describe, exported, networks, script, seeded, text, tokenizer
from models.archive import reading
from models.dtypes import TORCH_DTYPES
from models.program import Executable

_RECORDED_SIZE = 16


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model with its own weights, ready to run.

    `payload` is the content of its program file, empty for catalogued architectures; `tokenizer` that of its tokenizer, empty for a model without.
    """

    executable: Executable
    program: Program
    payload: bytes
    tokenizer: bytes = b""

    @property
    def module(self) -> nn.Module:
        """The torch module, in evaluation mode."""
        return self.executable.module

    @property
    def signature(self) -> Signature:
        """What it takes and gives."""
        return self.executable.signature

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Outputs by name. InvalidTensor when the inputs do not fit the signature."""
        names = {dtype: name for name, dtype in TORCH_DTYPES.items()}
        self.signature.bind({name: (names.get(tensor.dtype, str(tensor.dtype)), tensor.shape) for name, tensor in inputs.items()})
        with torch.inference_mode():
            return self.executable(inputs)

    def sample(self) -> dict[str, Tensor]:
        """One row of ones (or the fewest rows that the program takes): enough to walk through the model."""
        ranges = self.module.program.ranges if isinstance(self.module, exported.ExportedModule) else {}

        def size(dim: int | str) -> int:
            if isinstance(dim, int):
                return dim
            limits = ranges.get(dim)
            least, most = (limits.min_val or 1, limits.max_val or _RECORDED_SIZE) if limits else (1, _RECORDED_SIZE)
            return max(1, least) if dim == "batch" else max(least, min(_RECORDED_SIZE, most))

        return {spec.name: torch.ones([size(dim) for dim in spec.shape], dtype=TORCH_DTYPES[spec.dtype]) for spec in self.signature.inputs}


def load(ref: ModelRef) -> Loaded:
    """The model that `ref` names. InvalidArtifact names the file or the option that is wrong, Unavailable a package that is missing."""
    loaded, file = _load(ref), describe.tokenizer_file(ref)
    return replace(loaded, tokenizer=text.equip(loaded.executable, None if file is None else tokenizer.read(file)))


def _load(ref: ModelRef) -> Loaded:
    match ref.format:
        case ModelFormat.CATALOG:
            return _from_catalogue(catalogue.parse(ref.source))
        case ModelFormat.SAFETENSORS:
            return _from_safetensors(describe.model_file(ref))
        case ModelFormat.TORCH_EXPORT:
            return _from_export(describe.model_file(ref))
        case ModelFormat.TORCHSCRIPT:
            return _from_script(describe.model_file(ref))


def _from_catalogue(choice: catalogue.Choice) -> Loaded:
    module = networks.construct(choice.config)
    if choice.pretrained is None:
        seeded.fill(module, choice.seed)
        return _catalogued(module, choice.architecture, choice.config)
    return _published(module, choice, choice.pretrained)


def _from_safetensors(file: Path) -> Loaded:
    architecture, config = describe.architecture(file)
    return _with_weights(networks.construct(config), architecture, config, file)


def _with_weights(module: nn.Module, architecture: str, config: catalogue.Config, file: Path) -> Loaded:
    """Fills a module from a safetensors file whose names may carry the prefix of a whole transformers model ("bert.")."""
    with reading(file), safe_open(str(file), framework="pt") as tensors:
        names = set(tensors.keys())
        first = next(name for name, _ in module.named_parameters())
        prefix = next((prefix for prefix in ("", f"{architecture}.", "transformer.") if prefix + first in names), "")
        _fill(module, lambda name: tensors.get_tensor(prefix + name) if prefix + name in names else None, file)
    return _catalogued(module, architecture, config)


def _published(module: nn.Module, choice: catalogue.Choice, pretrained: catalogue.Pretrained) -> Loaded:
    """Fills a module from the weights of a package."""
    file = pretrained.path()
    if file.suffix == ".safetensors":
        return _with_weights(module, choice.architecture, choice.config, file)
    tensors = script.tensors(file)

    def find(name: str) -> Tensor | None:
        ours = next((beginning for beginning in pretrained.renamed if name.startswith(beginning)), "")
        return tensors.get(pretrained.renamed.get(ours, "") + name.removeprefix(ours))

    _fill(module, find, file)
    return _catalogued(module, choice.architecture, choice.config)


def _fill(module: nn.Module, find: Callable[[str], Tensor | None], file: Path) -> None:
    """Gives every parameter and buffer of a meta module the tensor that `find` has for its name; InvalidArtifact if one is missing or unfit."""
    for path, owner in module.named_modules():
        for table in (owner._parameters, owner._buffers):
            for key, like in table.items():
                if like is None:
                    continue
                name = f"{path}.{key}" if path else key
                tensor = find(name)
                if tensor is None:
                    raise InvalidArtifact(f"lacks the tensor {name}", key="model", value=str(file))
                if tensor.shape != like.shape or tensor.dtype != like.dtype:
                    was = f"{like.dtype} {list(like.shape)}, is {tensor.dtype} {list(tensor.shape)}"
                    raise InvalidArtifact(f"{name} must be {was}", key="model", value=str(file))
                table[key] = tensor.detach().contiguous()


def _catalogued(module: nn.Module, architecture: str, config: catalogue.Config) -> Loaded:
    program = Program("catalog", architecture, msgspec.json.encode(config, order="deterministic").decode())
    return Loaded(Executable(module, catalogue.signature(config)), program, b"")


def _from_export(file: Path) -> Loaded:
    stripped, tensors = exported.read(file)
    payload = exported.encode(stripped)
    executable = Executable(exported.decode(payload), stripped.signature)
    executable.bind(tensors)
    return Loaded(executable, _program("torch-export", payload), payload)


def _from_script(file: Path) -> Loaded:
    module = script.read(file, describe.script_signature(file))
    payload = module.encode()
    return Loaded(Executable(module, module.signature), _program("torchscript", payload), payload)


def _program(kind: str, payload: bytes) -> Program:
    return Program(kind, f"{blake3(payload).hexdigest()}.program")
