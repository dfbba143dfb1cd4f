"""Real inputs, made in place: sentences, speech-like sound, images.

Owns what a demonstration or a benchmark feeds to a model, as numpy arrays by input name. Never imports torch. The same seed gives the same inputs.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import numpy as np

from contracts.artifact import Signature
from contracts.errors import InvalidArtifact
from contracts.functions import ModelRef
from models import catalogue
from models.describe import describe

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Arrays = dict[str, "np.ndarray[Any, Any]"]

_SUBJECTS = (
    "The harbour master",
    "A retired teacher",
    "My neighbour",
    "The night train",
    "An old engineer",
    "The youngest player",
    "Our committee",
    "A quiet river",
)
_VERBS = ("repairs", "remembers", "describes", "has never seen", "would rather paint", "finally sold", "is looking for", "crosses")
_OBJECTS = (
    "a wooden boat",
    "the price of bread",
    "the northern lights",
    "two broken clocks",
    "a letter from Lisbon",
    "the longest bridge",
    "every station",
)
_ENDS = (
    "",
    " before breakfast",
    " because the weather has turned",
    " without saying a word to anybody",
    ", although nobody asked for it, and then goes home",
)
_RATE = 16_000
_DTYPES = {"FP16": "float16", "FP32": "float32", "FP64": "float64", "BOOL": "bool"}
_TOKEN_LIMIT = 64


def sample_inputs(ref: ModelRef, rows: int, seed: int) -> Arrays:
    """Inputs that `ref` takes, by name, `rows` of them. Named dimensions other than the rows vary with the seed.

    InvalidArtifact as `models.load.load` raises it, for a reference that cannot be understood without loading it.
    """
    random = np.random.default_rng(seed)
    signature, config = describe(ref)
    match config:
        case catalogue.Bert():
            return _texts(random, rows, config.vocab_size, min(_TOKEN_LIMIT, config.max_position_embeddings), masked=True)
        case catalogue.Gpt2():
            return _texts(random, rows, config.vocab_size, min(_TOKEN_LIMIT, config.n_positions), masked=False)
        case catalogue.Silero():
            return {"audio": _speech(random, rows, chunks=int(random.integers(8, 33)))}
        case catalogue.Vit() | catalogue.ResNet() | catalogue.Cnn():
            spec = signature.inputs[0]
            return {spec.name: _images(random, rows, int(spec.shape[1]), int(spec.shape[2]))}
    return _plain(random, rows, signature)


def sample_texts(rows: int, seed: int) -> list[str]:
    """Texts of one to three sentences, for models that take text."""
    return _paragraphs(np.random.default_rng(seed), rows)


def _paragraphs(random: np.random.Generator, rows: int) -> list[str]:
    return [" ".join(_sentence(random) for _ in range(random.integers(1, 4))) for _ in range(rows)]


def _sentence(random: np.random.Generator) -> str:
    parts = [str(random.choice(words)) for words in (_SUBJECTS, _VERBS, _OBJECTS, _ENDS)]
    return f"{parts[0]} {parts[1]} {parts[2]}{parts[3]}."


def _texts(random: np.random.Generator, rows: int, vocabulary: int, limit: int, masked: bool) -> Arrays:
    """Token ids of one to three sentences a row. With a mask, shorter rows are padded; without one, longer rows are cut."""
    ids = [tokens[:limit] for tokens in _tokens(_paragraphs(random, rows), vocabulary)]
    length = max(map(len, ids)) if masked else min(map(len, ids))
    table = np.zeros((rows, length), np.int64)
    mask = np.zeros((rows, length), np.int64)
    for row, tokens in enumerate(ids):
        table[row, : len(tokens)] = tokens[:length]
        mask[row, : len(tokens)] = 1
    return {"input_ids": table, "attention_mask": mask} if masked else {"input_ids": table}


def _tokens(texts: list[str], vocabulary: int) -> list[list[int]]:
    """BERT's word pieces where the vocabulary is BERT's and its package is installed; else the text's bytes: no other tokenizer is a package."""
    minilm = catalogue.ENTRIES["minilm"]
    if minilm.pretrained is not None and minilm.pretrained.installed and vocabulary == catalogue.Bert().vocab_size:
        tokenizer = _tokenizer(str(minilm.pretrained.path().with_name("tokenizer.json")))
        return [encoding.ids for encoding in tokenizer.encode_batch(texts)]
    return [[byte % vocabulary for byte in text.encode()] for text in texts]


@functools.cache
def _tokenizer(path: str) -> Tokenizer:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(path)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _speech(random: np.random.Generator, rows: int, chunks: int) -> np.ndarray[Any, Any]:
    """Recordings [rows, chunks, 512]: voiced syllables (a gliding pitch, its harmonics shaped by two formants) between pauses, over faint noise."""
    time = np.arange(chunks * catalogue.SPEECH_CHUNK) / _RATE
    sound = np.empty((rows, len(time)), np.float32)
    for row in range(rows):
        pitch = random.uniform(90, 220) * (1 + 0.15 * np.sin(2 * np.pi * random.uniform(0.5, 2) * time))
        phase = 2 * np.pi * np.cumsum(pitch) / _RATE
        formants = random.uniform((300, 900), (800, 2300))
        voice = np.zeros_like(time)
        for harmonic in range(1, 20):
            distance = np.abs(pitch.mean() * harmonic - formants).min()
            voice += np.sin(harmonic * phase) * np.exp(-distance / 200) / harmonic
        syllables = np.clip(np.sin(2 * np.pi * random.uniform(2, 5) * time + random.uniform(0, 6)) + 0.3, 0, 1)
        sound[row] = 0.3 * voice / np.abs(voice).max() * syllables + 0.003 * random.standard_normal(len(time))
    return sound.reshape(rows, chunks, catalogue.SPEECH_CHUNK)


def _images(random: np.random.Generator, rows: int, channels: int, size: int) -> np.ndarray[Any, Any]:
    """Images [rows, channels, size, size], normalised: a colour gradient, a disc and a little noise each."""
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / size
    images = np.empty((rows, channels, size, size), np.float32)
    for row in range(rows):
        angle, (centre_x, centre_y, radius) = random.uniform(0, 2 * np.pi), random.uniform((0.2, 0.2, 0.1), (0.8, 0.8, 0.4))
        disc = np.hypot(x - centre_x, y - centre_y) < radius
        for channel in range(channels):
            ground = np.cos(angle + channel) * x + np.sin(angle + channel) * y
            images[row, channel] = np.where(disc, random.uniform(-1, 1), ground) + 0.05 * random.standard_normal((size, size))
    return images


def _plain(random: np.random.Generator, rows: int, signature: Signature) -> Arrays:
    """Numbers for a signature of which nothing more is known: normal floats, small whole numbers."""
    sizes: dict[int | str, int] = {"batch": rows}
    arrays: Arrays = {}
    for spec in signature.inputs:
        shape = [dim if isinstance(dim, int) else sizes.setdefault(dim, int(random.integers(4, 17))) for dim in spec.shape]
        dtype = _DTYPES.get(spec.dtype, spec.dtype.lower())
        if dtype == "bf16":
            raise InvalidArtifact("numpy has no such type", key=spec.name, value=spec.dtype)
        numbers = random.standard_normal(shape) if spec.dtype.startswith("FP") else random.integers(0, 2, shape)
        arrays[spec.name] = numbers.astype(dtype)
    return arrays
