"""What a loaded model can do with text: whether its sequences may be padded, and the text input that a tokenizer gives it.

Owns that decision, which the signature then holds. The catalogue's networks say themselves whether they may be padded. An exported program cannot, so
it is tried: its mask must make padding harmless, or its sequences are left as they are.
"""

from __future__ import annotations

import msgspec
import torch
from torch import Tensor

from contracts.artifact import Signature
from models import attention, exported, tokenizer
from models.dtypes import TORCH_DTYPES
from models.program import Executable

_SHORT, _PADDING = 5, 11


def equip(executable: Executable, source: tokenizer.Source | None) -> bytes:
    """Completes the executable's signature; the tokenizer's content if the model takes text by it. InvalidArtifact if it cannot be this model's."""
    limits = _limits(executable)
    signature = msgspec.structs.replace(executable.signature, text=None)
    masked = tokenizer.padded(signature, 0 if source is None else source.pad_id)
    says_so = source is not None and bool(signature.padded)
    if says_so or (isinstance(executable.module, exported.ExportedModule) and _is_harmless(executable, masked, limits)):
        signature = masked
    executable.signature = signature if source is None else tokenizer.with_text(signature, source, limits)
    return b"" if source is None or executable.signature.text is None else source.content


def _limits(executable: Executable) -> tokenizer.Limits:
    module = executable.module
    if isinstance(module, attention.Bert):
        return tokenizer.Limits(1, module.config.max_position_embeddings, module.config.vocab_size)
    if isinstance(module, attention.Gpt2):
        return tokenizer.Limits(1, module.config.n_positions, module.config.vocab_size)
    dim = tokenizer.sequence(executable.signature)
    if isinstance(module, exported.ExportedModule) and dim in module.program.ranges:
        limits = module.program.ranges[dim]
        return tokenizer.Limits(max(1, limits.min_val or 1), limits.max_val)
    return tokenizer.Limits()


def _is_harmless(executable: Executable, signature: Signature, limits: tokenizer.Limits) -> bool:
    """Whether a row gives the same numbers, but for rounding, when it is padded as `signature` says. A fixed length leaves no choice."""
    if not signature.padded:
        return True
    short = max(_SHORT, limits.least)
    long = short + _PADDING if limits.most is None else min(short + _PADDING, limits.most)
    if long <= short:
        return False
    try:
        with torch.inference_mode():
            alone, padded = (executable(_row(signature, short, length)) for length in (short, long))
    except Exception:  # a vocabulary of less than a handful, sizes that go together: whatever it is, it cannot be padded
        return False
    return all(_same(alone[spec.name], padded[spec.name], [dim in signature.padded for dim in spec.shape]) for spec in signature.outputs)


def _row(signature: Signature, tokens: int, length: int) -> dict[str, Tensor]:
    row = {}
    for spec in signature.inputs:
        values = torch.zeros(tokens) if spec.name == "token_type_ids" else torch.ones(tokens)
        if spec.name == "input_ids":
            values = 2 + torch.arange(tokens) % 3
        padding = torch.full((length - tokens,), spec.pad or 0)
        row[spec.name] = torch.cat((values, padding)).to(TORCH_DTYPES[spec.dtype])[None]
    return row


def _same(alone: Tensor, padded: Tensor, along: list[bool]) -> bool:
    own = padded[tuple(slice(size if cut else None) for size, cut in zip(alone.shape, along, strict=True))]
    return own.shape == alone.shape and torch.allclose(own.double(), alone.double(), rtol=1e-2, atol=1e-3)
