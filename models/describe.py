"""What a model is, found without loading it and without torch.

Owns the way from a reference to files and from a configuration file to an architecture. Reads headers and small JSON files, never weights.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from contracts.artifact import Signature
from contracts.errors import InvalidArtifact
from contracts.functions import ModelFormat, ModelRef
from models import catalogue, schema, tokenizer
from models.archive import Archive, locate, reading


class Described(NamedTuple):
    """A model's signature, and its parameters if the catalogue knows its architecture."""

    signature: Signature
    config: catalogue.Config | None


def describe(ref: ModelRef) -> Described:
    """What `ref` takes and gives; InvalidArtifact as `models.load.load` raises it."""
    match ref.format:
        case ModelFormat.CATALOG:
            config = catalogue.parse(ref.source).config
        case ModelFormat.SAFETENSORS:
            _, config = architecture(model_file(ref))
        case ModelFormat.TORCH_EXPORT:
            return Described(_exported(model_file(ref)), None)
        case ModelFormat.TORCHSCRIPT:
            return Described(script_signature(model_file(ref)), None)
    return Described(catalogue.signature(config), config)


_PATTERNS = {ModelFormat.SAFETENSORS: "*.safetensors", ModelFormat.TORCH_EXPORT: "*.pt2", ModelFormat.TORCHSCRIPT: "*.pt"}


def model_file(ref: ModelRef) -> Path:
    """The model file: the path itself, or the one file in a folder that fits the format."""
    path, pattern = locate(ref.source), _PATTERNS[ref.format]
    if path.is_dir():
        found = sorted(path.glob(pattern))
        if len(found) != 1:
            raise InvalidArtifact(f"must hold exactly one {pattern} file, holds {len(found)}", key="storageUri", value=str(path))
        return found[0]
    if not path.is_file():
        raise InvalidArtifact("is no file", key="storageUri", value=str(path))
    return path


def tokenizer_file(ref: ModelRef) -> Path | None:
    """The tokenizer that belongs to a model, if it brings one: beside its file, in its package, or as the catalogue's option says."""
    if ref.format is ModelFormat.CATALOG:
        return catalogue.parse(ref.source).tokenizer_path()
    beside = model_file(ref).with_name(tokenizer.FILE)
    return beside if beside.is_file() else None


def script_signature(path: Path) -> Signature:
    """The signature beside a TorchScript file, `<stem>.signature.json` or `signature.json` (contracts.artifact.Signature)."""
    for beside in (path.with_suffix(".signature.json"), path.with_name("signature.json")):
        if beside.is_file():
            with reading(beside):
                return msgspec.json.decode(beside.read_bytes(), type=Signature)
    raise InvalidArtifact("needs a signature beside it (<stem>.signature.json), since TorchScript records no shapes", key="model", value=str(path))


def architecture(file: Path) -> tuple[str, catalogue.Config]:
    """The architecture of a safetensors file and its parameters, from the config.json beside it."""
    beside = file.with_name("config.json")
    with reading(beside):
        name, arguments = _arguments(json.loads(beside.read_bytes()), beside)
    return name, catalogue.configure(name, arguments, str(beside))


def _exported(path: Path) -> Signature:
    archive = Archive(path)
    try:
        with reading(path):
            return schema.strip(schema.read(archive, path)[1]).signature
    finally:
        archive.close()


def _arguments(document: Any, path: Path) -> tuple[str, dict[str, object]]:
    """(architecture, arguments) from a configuration of Sluice's own or of transformers'."""
    if not isinstance(document, dict):
        raise InvalidArtifact("must be a JSON object", key="model", value=str(path))
    if "sluice_architecture" in document:
        arguments = document.get("sluice_arguments", {})
        if not isinstance(arguments, dict):
            raise InvalidArtifact("sluice_arguments must be a JSON object", key="model", value=str(path))
        return str(document["sluice_architecture"]), arguments
    architecture = str(document.get("model_type"))
    known = catalogue.ARCHITECTURES.get(architecture)
    arguments = {key: document[key] for key in (known.__struct_fields__ if known else ()) if key in document}
    if architecture == "bert" and path.with_name("modules.json").is_file():
        arguments["output"] = "sentence"
    return architecture, arguments
