"""Tokenizers: part of the artifact of a model that takes text, as `tokenizer.json` of the tokenizers library, which holds data and no code.

Owns which models can take text, the checking of a tokenizer file, and the one way from texts to token inputs. Imports no torch: the loader checks
here what the predictor's front runs. Never opens anything but the file and the `sentence_bert_config.json` beside it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
from blake3 import blake3
from tokenizers import Tokenizer

from contracts.artifact import Signature, TensorSpec, Text
from contracts.errors import InvalidArtifact, InvalidTensor
from contracts.units import MIB
from models.archive import reading

FILE = "tokenizer.json"
_MOST_BYTES = 64 * MIB
_MOST_TOKENS = 512
"""Where neither model nor tokenizer sets a limit."""

_COLUMNS = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
"""The inputs that a tokenizer can make, by the names that transformers gives them, and what the tokenizers library calls them."""

Arrays = dict[str, "np.ndarray[Any, Any]"]


class Limits(NamedTuple):
    """How many tokens a model takes, and the size of its vocabulary (None: not known)."""

    least: int = 1
    most: int | None = None
    vocabulary: int | None = None


class Source(NamedTuple):
    """A tokenizer file that was read: its bytes, and what they say."""

    path: Path
    content: bytes
    pad_id: int
    most: int | None
    vocabulary: int


def sequence(signature: Signature) -> int | str | None:
    """The dimension that counts tokens, if all inputs are tokens: `input_ids`, perhaps `attention_mask` and `token_type_ids`; None otherwise."""
    names = {spec.name for spec in signature.inputs}
    dims = {spec.shape[1:] for spec in signature.inputs}
    whole = all(spec.dtype in ("INT64", "INT32") and len(spec.shape) == 2 for spec in signature.inputs)
    if "input_ids" not in names or not names <= _COLUMNS.keys() or not whole or len(dims) != 1 or not signature.batchable:
        return None
    return next(iter(dims))[0]


def padded(signature: Signature, pad_id: int) -> Signature:
    """The signature of a model whose attention mask makes padding harmless; unchanged for one without."""
    dim = sequence(signature)
    if dim is None or all(spec.name != "attention_mask" for spec in signature.inputs):
        return signature
    inputs = tuple(msgspec.structs.replace(spec, pad=pad_id if spec.name == "input_ids" else 0) for spec in signature.inputs)
    return msgspec.structs.replace(signature, inputs=inputs, padded=(dim,) if isinstance(dim, str) else ())


def read(path: Path) -> Source:
    """A tokenizer file; InvalidArtifact names it when it is broken, too large, or no tokenizer."""
    if not path.is_file():
        raise InvalidArtifact("is no file", key="tokenizer", value=str(path))
    with reading(path):
        if path.stat().st_size > _MOST_BYTES:
            raise InvalidArtifact(f"must have at most {_MOST_BYTES} bytes", key="tokenizer", value=path.stat().st_size)
        content = path.read_bytes()
        tokenizer = _parse(content)
        most = (tokenizer.truncation or {}).get("max_length")
        beside = path.with_name("sentence_bert_config.json")
        if beside.is_file():
            most = msgspec.json.decode(beside.read_bytes(), type=dict[str, Any]).get("max_seq_length") or most
        return Source(path, content, _pad_id(tokenizer), None if most is None else int(most), tokenizer.get_vocab_size())


def with_text(signature: Signature, source: Source, limits: Limits) -> Signature:
    """The signature with a text input; unchanged if the model takes no tokens. InvalidArtifact if the tokenizer cannot be this model's."""
    dim = sequence(signature)
    fixed = isinstance(dim, int)
    taken = any(spec.name == "text" for spec in signature.inputs)
    if dim is None or taken or (fixed and all(spec.pad is None for spec in signature.inputs)):
        return signature
    if limits.vocabulary is not None and source.vocabulary > limits.vocabulary:
        was = f"{source.path} knows {source.vocabulary} tokens, the model {limits.vocabulary}"
        raise InvalidArtifact(f"is the tokenizer of another model ({was})", key="tokenizer", value=source.path.name)
    most = min(source.most or limits.most or _MOST_TOKENS, limits.most or source.most or _MOST_TOKENS)
    least, most = (int(dim), int(dim)) if fixed else (min(limits.least, most), most)
    found = msgspec.structs.replace(signature, text=Text(f"{blake3(source.content).hexdigest()}.tokenizer", most, least))
    with reading(source.path), contextlib.suppress(InvalidTensor):
        encode(build(source.content, most), found, ["a"])
    return found


def build(content: bytes, max_tokens: int) -> Tokenizer:
    """The tokenizer, which cuts to `max_tokens` and pads nothing. InvalidArtifact when it is none."""
    tokenizer = _parse(content)
    with _contained():
        tokenizer.enable_truncation(max_tokens)
        tokenizer.no_padding()
    return tokenizer


def encode(tokenizer: Tokenizer, signature: Signature, texts: Sequence[str]) -> Arrays:
    """Token inputs [len(texts), tokens] of a model that takes text, padded to the longest; InvalidTensor names the text that cannot be one.

    Releases the interpreter's lock while it works, in one thread if TOKENIZERS_PARALLELISM is false.
    """
    text = signature.text
    assert text is not None
    with _contained():
        found = tokenizer.encode_batch_fast(list(texts))
    lengths = [len(encoding) for encoding in found]
    if 0 in lengths:
        raise InvalidTensor("has no token in it", key=text.name, value=texts[lengths.index(0)][:80])
    length = max(*lengths, text.min_tokens)
    arrays: Arrays = {}
    for spec in signature.inputs:
        if spec.pad is None and min(lengths) < length:
            raise InvalidTensor(
                "must have as many tokens in each row, since the model has no mask: send them one by one", key=text.name, value=lengths
            )
        arrays[spec.name] = _table(spec, [getattr(encoding, _COLUMNS[spec.name]) for encoding in found], length)
    return arrays


def _table(spec: TensorSpec, rows: Sequence[Sequence[int]], length: int) -> np.ndarray[Any, Any]:
    table = np.full((len(rows), length), spec.pad or 0, spec.dtype.lower())
    for row, values in zip(table, rows, strict=True):
        row[: len(values)] = values
    return table


def _pad_id(tokenizer: Tokenizer) -> int:
    """The token that the tokenizer pads with, or the one that is called so; 0 if there is none."""
    if tokenizer.padding:
        return int(tokenizer.padding["pad_id"])
    return next((id_ for name in ("[PAD]", "<pad>", "<|pad|>") if (id_ := tokenizer.token_to_id(name)) is not None), 0)


def _parse(content: bytes) -> Tokenizer:
    with _contained():
        return Tokenizer.from_str(content.decode())


@contextlib.contextmanager
def _contained() -> Iterator[None]:
    """What the library raises becomes InvalidArtifact, its panics (which are no Exception) included."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__module__ != "pyo3_runtime":
            raise
        detail = " ".join(str(error).split())[:200]
        raise InvalidArtifact(f"its tokenizer does not work ({type(error).__name__}: {detail})") from None
