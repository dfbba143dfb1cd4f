"""YAML files of InferenceService documents -> functions.

Owns the reading of files and the messages that say where in which file something is wrong. What a document means is `contracts.functions`'s to say.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from contracts.errors import InvalidFunction
from contracts.functions import Function, from_inference_service


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key written twice; YAML itself would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[object] = set()
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode) and key_node.tag != "tag:yaml.org,2002:merge":
                if key_node.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"the key {key_node.value!r} stands here twice", key_node.start_mark)
                seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def read_functions(paths: Sequence[Path]) -> list[Function]:
    """The functions of all documents of all files, in order; InvalidFunction names file, document, key and value."""
    found: dict[str, tuple[Function, str]] = {}
    for path in paths:
        before = len(found)
        for place, document in documents(path):
            try:
                function = from_inference_service(document)
            except InvalidFunction as error:
                raise InvalidFunction(f"{place}: {error.message}") from None
            for other, first in found.values():
                if other.name == function.name:
                    raise InvalidFunction(
                        f"{place}: metadata.name: {function.key!r} has the name of {other.key!r} ({first}); "
                        "on one port a name can mean only one function: rename one"
                    )
            found[function.key] = (function, place)
        if len(found) == before:
            raise InvalidFunction(f"{path}: holds no document: write at least one InferenceService")
    return [function for function, _ in found.values()]


def documents(path: Path) -> Iterator[tuple[str, object]]:
    """("file, document n", document) for each document that is not empty; n counts from 1 and counts empty ones too.

    The items of a List, as `kubectl get -o yaml` writes it, count as documents of their own.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise InvalidFunction(f"{path}: cannot be read: {reason}") from None
    number = 0
    try:
        for document in yaml.load_all(text, _Loader):
            number += 1
            if isinstance(document, dict) and document.get("kind") == "List" and isinstance(document.get("items"), list):
                for item, part in enumerate(document["items"], 1):
                    yield f"{path}, document {number}, item {item}", part
            elif document is not None:
                yield f"{path}, document {number}", document
    except (yaml.YAMLError, RecursionError) as error:
        raise InvalidFunction(f"{path}, document {number + 1}: is no YAML: {' '.join(str(error).split())}") from None
