"""Small models that take tokens, exported, and a tokenizer of whole words."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn

WORDS = ("[UNK]", "[PAD]", "a", "boat", "crosses", "every", "harbour", "master", "old", "the")
VOCABULARY = 16


def tokenizer_json(words: tuple[str, ...] = WORDS) -> str:
    """Each word is its place in the list; [PAD] is 1."""
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return str(tokenizer.to_str())


class Encoder(nn.Module):
    """Attention over the tokens that the mask leaves, and the mean of them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(11)
        self.embed = nn.Embedding(VOCABULARY, 8)
        self.inner = nn.Linear(8, 8)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """States [batch, seq, 8] and their mean [batch, 8]."""
        x = self.embed(input_ids)
        scores = (x @ x.transpose(1, 2)).masked_fill(attention_mask[:, None, :] == 0, -1e9)
        states = x + self.inner(scores.softmax(-1) @ x)
        weight = attention_mask.unsqueeze(-1).float()
        return {"states": states, "mean": (states * weight).sum(1) / weight.sum(1)}


class Deaf(Encoder):
    """Takes a mask and does not heed it."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """The mean over all, padding included [batch, 8]."""
        return {"mean": self.embed(input_ids).mean(1) + 0 * attention_mask.sum()}


class Last(Encoder):
    """Heeds the mask, and then gives what stands at the end, which may be padding."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """The last state [batch, 8]."""
        return {"last": super().forward(input_ids, attention_mask)["states"][:, -1]}


class Decoder(nn.Module):
    """No mask at all."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(12)
        self.embed = nn.Embedding(VOCABULARY, 8)

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        """The mean [batch, 8]."""
        return {"mean": self.embed(input_ids).mean(1)}


def export(module: nn.Module, path: Path, longest: int = 32, fixed: int = 0, dtype: torch.dtype = torch.int64) -> Path:
    """Writes the program; sequences of up to `longest` tokens, or of exactly `fixed`. Returns the path."""
    names = ("input_ids", "attention_mask") if isinstance(module, Encoder) else ("input_ids",)
    batch, seq = torch.export.Dim("batch", max=64), torch.export.Dim("seq", min=2, max=longest)
    inputs = tuple(torch.ones(2, fixed or 5, dtype=dtype) for _ in names)
    dims = {name: {0: batch} if fixed else {0: batch, 1: seq} for name in names}
    torch.export.save(torch.export.export(module.eval(), inputs, dynamic_shapes=dims), path)
    return path
