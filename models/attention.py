"""The catalogue's transformers: BERT, ViT and GPT-2, with the parameter names of the published safetensors files.

Own definitions, because importing the transformers package costs a lane seconds and 150 MB before its first answer; tests hold each against
transformers' module with the same weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from contracts.errors import InvalidTensor
from models import catalogue

_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "gelu_new": partial(functional.gelu, approximate="tanh"),
    "relu": functional.relu,
    "silu": functional.silu,
}


def _attend(projected: tuple[Tensor, ...], heads: int, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """Attention over (query, key, value), each [batch, seq, width], split into heads; `mask` is added to the scores."""
    query, key, value = (tensor.view(*tensor.shape[:2], heads, -1).transpose(1, 2) for tensor in projected)
    attended = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal)
    return attended.transpose(1, 2).flatten(2)


def _check_tokens(ids: Tensor, vocabulary: int, positions: int) -> None:
    """InvalidTensor for what an embedding table does not hold.

    Looks at tensors of the CPU only: on a GPU that would make the host wait, so `check` must have seen them before (a bad index costs the context).
    """
    if ids.is_cuda:
        return
    if ids.shape[1] > positions:
        raise InvalidTensor(f"has more tokens than the model has positions ({positions})", key="input_ids", value=ids.shape[1])
    low, high = ids.aminmax()
    if low < 0 or high >= vocabulary:
        raise InvalidTensor(f"holds a token outside the vocabulary of {vocabulary}", key="input_ids", value=int(low if low < 0 else high))


class _Projections(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.query(x), self.key(x), self.value(x)


class _BertOutput(nn.Module):
    def __init__(self, inner: int, width: int, eps: float) -> None:
        super().__init__()
        self.dense = nn.Linear(inner, width)
        self.LayerNorm = nn.LayerNorm(width, eps)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return cast(Tensor, self.LayerNorm(self.dense(x) + residual))


class _Dense(nn.Module):
    def __init__(self, inner: int, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.dense(x))


class _BertLayer(nn.Module):
    def __init__(self, config: catalogue.Bert) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.attention = nn.ModuleDict({"self": _Projections(width), "output": _BertOutput(width, width, eps)})
        self.intermediate = _Dense(width, config.intermediate_size)
        self.output = _BertOutput(config.intermediate_size, width, eps)
        self.heads, self.activation = config.num_attention_heads, _ACTIVATIONS[config.hidden_act]

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.attention["output"](_attend(self.attention["self"](x), self.heads, mask), x)
        return cast(Tensor, self.output(self.activation(self.intermediate(x)), x))


class _BertEmbeddings(nn.Module):
    def __init__(self, config: catalogue.Bert) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, ids: Tensor) -> Tensor:
        positions = torch.arange(ids.shape[1], device=ids.device)
        x = self.word_embeddings(ids) + self.token_type_embeddings(torch.zeros_like(ids)) + self.position_embeddings(positions)
        return cast(Tensor, self.LayerNorm(x))


class Bert(nn.Module):
    """The encoder, and then the pooler or the mean over the tokens."""

    def __init__(self, config: catalogue.Bert) -> None:
        super().__init__()
        self.config = config
        self.embeddings = _BertEmbeddings(config)
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(_BertLayer(config) for _ in range(config.num_hidden_layers))})
        self.pooler = _Dense(config.hidden_size, config.hidden_size) if config.output == "pooled" else None

    def check(self, input_ids: Tensor, attention_mask: Tensor) -> None:
        """As models.program.Executable.check."""
        _check_tokens(input_ids, self.config.vocab_size, self.config.max_position_embeddings)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Input ids and attention mask [batch, seq] -> embedding [batch, hidden_size]."""
        self.check(input_ids, attention_mask)
        x = self.embeddings(input_ids)
        present = attention_mask.ne(0)
        mask = x.new_zeros(present.shape).masked_fill(~present, torch.finfo(x.dtype).min)[:, None, None, :]
        for layer in cast(nn.ModuleList, self.encoder["layer"]):
            x = layer(x, mask)
        if self.pooler is not None:
            return torch.tanh(self.pooler(x[:, 0]))
        weight = present.unsqueeze(-1).to(x.dtype)
        return functional.normalize((x * weight).sum(1) / weight.sum(1).clamp(min=1e-9), dim=1)


class _VitEmbeddings(nn.Module):
    def __init__(self, config: catalogue.Vit) -> None:
        super().__init__()
        patches = (config.image_size // config.patch_size) ** 2
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.hidden_size))
        self.position_embeddings = nn.Parameter(torch.empty(1, patches + 1, config.hidden_size))
        projection = nn.Conv2d(config.num_channels, config.hidden_size, config.patch_size, stride=config.patch_size)
        self.patch_embeddings = nn.ModuleDict({"projection": projection})

    def forward(self, image: Tensor) -> Tensor:
        patches = self.patch_embeddings["projection"](image).flatten(2).transpose(1, 2)
        return torch.cat((self.cls_token.expand(len(image), -1, -1), patches), 1) + self.position_embeddings


class _VitLayer(nn.Module):
    def __init__(self, config: catalogue.Vit) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.layernorm_before, self.layernorm_after = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps)
        self.attention = nn.ModuleDict({"attention": _Projections(width), "output": _Dense(width, width)})
        self.intermediate = _Dense(width, config.intermediate_size)
        self.output = _Dense(config.intermediate_size, width)
        self.heads, self.activation = config.num_attention_heads, _ACTIVATIONS[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention["output"](_attend(self.attention["attention"](self.layernorm_before(x)), self.heads))
        return x + cast(Tensor, self.output(self.activation(self.intermediate(self.layernorm_after(x)))))


class Vit(nn.Module):
    """The embedding is the class token after the last layer."""

    def __init__(self, config: catalogue.Vit) -> None:
        super().__init__()
        self.embeddings = _VitEmbeddings(config)
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(_VitLayer(config) for _ in range(config.num_hidden_layers))})
        self.layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, image: Tensor) -> Tensor:
        """Image [batch, channels, size, size] -> embedding [batch, hidden_size]."""
        x = self.embeddings(image)
        for layer in cast(nn.ModuleList, self.encoder["layer"]):
            x = layer(x)
        return cast(Tensor, self.layernorm(x[:, 0]))


class _Conv1d(nn.Module):
    """GPT-2's linear layer, whose weight is stored [in, out]."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(before, after))
        self.bias = nn.Parameter(torch.empty(after))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.flatten(0, 1), self.weight).view(*x.shape[:2], -1)


class _GptLayer(nn.Module):
    def __init__(self, config: catalogue.Gpt2) -> None:
        super().__init__()
        width, eps = config.n_embd, config.layer_norm_epsilon
        self.ln_1, self.ln_2 = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps)
        self.attn = nn.ModuleDict({"c_attn": _Conv1d(width, 3 * width), "c_proj": _Conv1d(width, width)})
        self.mlp = nn.ModuleDict({"c_fc": _Conv1d(width, 4 * width), "c_proj": _Conv1d(4 * width, width)})
        self.heads, self.activation = config.n_head, _ACTIVATIONS[config.activation_function]

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn["c_proj"](_attend(self.attn["c_attn"](self.ln_1(x)).chunk(3, -1), self.heads, causal=True))
        return x + cast(Tensor, self.mlp["c_proj"](self.activation(self.mlp["c_fc"](self.ln_2(x)))))


class Gpt2(nn.Module):
    """The head is the word embedding; only the last position goes through it."""

    def __init__(self, config: catalogue.Gpt2) -> None:
        super().__init__()
        self.config = config
        self.wte, self.wpe = nn.Embedding(config.vocab_size, config.n_embd), nn.Embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList(_GptLayer(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon)

    def check(self, input_ids: Tensor) -> None:
        """As models.program.Executable.check."""
        _check_tokens(input_ids, self.config.vocab_size, self.config.n_positions)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Input ids [batch, seq] -> logits of the next token [batch, vocab_size]."""
        self.check(input_ids)
        x = self.wte(input_ids) + self.wpe(torch.arange(input_ids.shape[1], device=input_ids.device))
        for layer in self.h:
            x = layer(x)
        return functional.linear(self.ln_f(x[:, -1]), self.wte.weight)
