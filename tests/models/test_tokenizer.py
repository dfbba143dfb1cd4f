"""Tokenizers as part of a model: who takes text, what is refused, and that padding is only allowed where it changes nothing."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from contracts.artifact import Signature, Text
from contracts.errors import InvalidArtifact, InvalidTensor, Unavailable
from contracts.functions import ModelFormat, ModelRef
from models import store as files
from models import tokenizer
from models.load import Loaded, load
from models.samples import sample_texts
from models.store_writer import write
from tests.models.text_models import WORDS, Deaf, Decoder, Encoder, Last, export, tokenizer_json

HUGE = 1 << 40


def of_catalogue(source: str) -> Loaded:
    return load(ModelRef(ModelFormat.CATALOG, source))


def exported(folder: Path, module: nn.Module, with_tokenizer: bool = True, **shape: int) -> Loaded:
    if with_tokenizer:
        (folder / "tokenizer.json").write_text(tokenizer_json())
    return load(ModelRef(ModelFormat.TORCH_EXPORT, str(export(module, folder / "model.pt2", **shape))))


def tokens(model: Loaded, *texts: str) -> dict[str, np.ndarray]:
    assert model.signature.text is not None
    return tokenizer.encode(tokenizer.build(model.tokenizer, model.signature.text.max_tokens), model.signature, texts)


def answer(model: Loaded, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in model.run({name: torch.from_numpy(array) for name, array in inputs.items()}).items()}


def test_minilm_is_tokenised_as_its_publishers_do(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = of_catalogue("minilm")
    assert model.signature.text is not None
    assert model.signature.text.max_tokens == 256
    path = tmp_path / "tokenizer.json"
    path.write_bytes(model.tokenizer)
    published = transformers.PreTrainedTokenizerFast(tokenizer_file=str(path), pad_token="[PAD]")
    texts = [*sample_texts(5, seed=3), "word " * 400, "naïve 漢字 ☂"]
    wanted = published(texts, padding=True, truncation=True, max_length=256, return_tensors="np")
    found = tokens(model, *texts)
    assert found["input_ids"].shape == (7, 256)
    for name, array in found.items():
        assert array.dtype == np.int64
        np.testing.assert_array_equal(array, wanted[name])


def test_a_padded_text_gives_what_it_gives_alone() -> None:
    model = of_catalogue("minilm")
    texts = ["a boat", *sample_texts(2, seed=5)]
    together = answer(model, tokens(model, *texts))["embedding"]
    for row, text in zip(together, texts, strict=True):
        np.testing.assert_allclose(row, answer(model, tokens(model, text))["embedding"][0], atol=1e-5)


def test_a_catalogued_network_takes_the_tokenizer_that_its_source_names(tmp_path: Path) -> None:
    path = tmp_path / "words.json"
    path.write_text(tokenizer_json())
    small = "num_hidden_layers=1&hidden_size=24&intermediate_size=32"
    assert of_catalogue(f"bert-base?{small}").signature.text is None
    assert of_catalogue(f"bert-base?{small}&tokenizer=minilm").tokenizer == of_catalogue("minilm").tokenizer
    named = of_catalogue(f"bert-base?{small}&max_position_embeddings=40&tokenizer={path}")
    assert named.signature.text is not None
    assert named.signature.text.max_tokens == 40
    assert {spec.name: spec.pad for spec in named.signature.inputs} == {"input_ids": 1, "attention_mask": 0}
    with pytest.raises(InvalidArtifact, match=r"another model .* knows 30522 tokens, the model 100"):
        of_catalogue(f"bert-base?{small}&vocab_size=100&tokenizer=minilm")
    with pytest.raises(InvalidArtifact, match="mlp has no option 'tokenizer'"):
        of_catalogue("mlp?tokenizer=minilm")


NO_FILES = {
    "/nowhere/tokenizer.json": "is no file",
    "/dev/zero": "is no file",
    "nonsense": "must be a file://",
    "http://host/t.json": "must be a file://",
}


@pytest.mark.parametrize(("source", "message"), NO_FILES.items(), ids=NO_FILES)
def test_a_tokenizer_that_is_no_file_is_named(source: str, message: str) -> None:
    with pytest.raises(InvalidArtifact, match=message):
        of_catalogue(f"gpt2?n_layer=1&n_embd=24&n_head=2&tokenizer={source}")


def test_a_reference_to_a_tokenizer_that_is_not_there_yet_has_a_name(tmp_path: Path) -> None:
    path = tmp_path / "words.json"
    ref = ModelRef(ModelFormat.CATALOG, f"gpt2?tokenizer={path}")
    before = files.ref_name(ref)
    path.write_text(tokenizer_json())
    assert files.ref_name(ref) != before


def test_a_model_without_a_mask_takes_texts_that_are_equally_long() -> None:
    model = of_catalogue("gpt2?n_layer=1&n_embd=24&n_head=2&n_positions=32&vocab_size=30522&tokenizer=minilm")
    assert not model.signature.padded
    assert tokens(model, "a boat", "the harbour")["input_ids"].shape == (2, 4)
    with pytest.raises(InvalidTensor, match=r"as many tokens in each row, .* got \[3, 4\]"):
        tokens(model, "boat", "the harbour")


EXPORTS: dict[str, tuple[nn.Module, dict[str, int], bool, Text]] = {
    "a mask that is heeded": (Encoder(), {}, True, Text("", 32, 2)),
    "a mask that is not": (Deaf(), {}, False, Text("", 32, 2)),
    "the state at the end": (Last(), {}, False, Text("", 32, 2)),
    "no mask": (Decoder(), {}, False, Text("", 32, 2)),
    "a fixed length and a mask": (Encoder(), {"fixed": 12}, False, Text("", 12, 12)),
}


@pytest.mark.parametrize(("module", "shape", "padded", "text"), EXPORTS.values(), ids=EXPORTS)
def test_an_exported_model_is_padded_only_if_its_mask_makes_that_harmless(
    module: nn.Module, shape: dict[str, int], padded: bool, text: Text, tmp_path: Path
) -> None:
    model = exported(tmp_path, module, **shape)
    assert bool(model.signature.padded) == padded
    assert model.signature.text is not None
    assert msgspec.structs.replace(model.signature.text, tokenizer="") == text
    found = answer(model, tokens(model, "the old harbour master", "every harbour crosses a"))
    assert all(len(rows) == 2 for rows in found.values())


def test_an_exported_model_gives_each_row_of_a_padded_batch_what_it_gives_alone(tmp_path: Path) -> None:
    model = exported(tmp_path, Encoder())
    texts = ["the boat", "the old harbour master crosses every boat", "a b"]
    inputs = tokens(model, *texts)
    assert inputs["input_ids"][0].tolist() == [9, 3, 1, 1, 1, 1, 1]
    found = answer(model, inputs)
    for row, text in enumerate(texts):
        alone = answer(model, tokens(model, text))
        np.testing.assert_allclose(found["mean"][row], alone["mean"][0], atol=1e-5)
        np.testing.assert_allclose(found["states"][row][: alone["states"].shape[1]], alone["states"][0], atol=1e-5)


def test_a_fixed_length_is_filled_and_cut(tmp_path: Path) -> None:
    model = exported(tmp_path, Encoder(), fixed=6)
    found = tokens(model, "the boat", "the " * 30)
    assert found["attention_mask"].sum(1).tolist() == [2, 6]
    assert found["input_ids"].shape == (2, 6)


def test_a_fixed_length_without_a_mask_takes_no_text(tmp_path: Path) -> None:
    model = exported(tmp_path, Decoder(), fixed=6)
    assert model.signature.text is None
    assert model.tokenizer == b""


def test_the_tokens_have_the_inputs_own_type(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(tokenizer_json())
    model = load(ModelRef(ModelFormat.TORCH_EXPORT, str(export(Encoder(), tmp_path / "model.pt2", dtype=torch.int32))))
    assert {array.dtype for array in tokens(model, "a boat").values()} == {np.dtype(np.int32)}


def test_without_a_tokenizer_a_mask_still_allows_padding(tmp_path: Path) -> None:
    model = exported(tmp_path, Encoder(), with_tokenizer=False)
    assert model.signature.text is None
    assert len(model.signature.padded) == 1


def test_a_sentence_limit_beside_the_tokenizer_counts(tmp_path: Path) -> None:
    (tmp_path / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 7}))
    model = exported(tmp_path, Encoder())
    assert tokens(model, "the " * 30)["input_ids"].shape == (1, 7)


BROKEN = {
    "empty": b"",
    "no JSON": b"a tokenizer",
    "JSON of something else": b'{"model_type": "bert"}',
    "no text at all": b"\xff\xfe\x00",
    "a model of a kind that there is not": b'{"version": "1.0", "added_tokens": [], "model": {"type": "Pickle", "code": "import os"}}',
    "torn": tokenizer_json().encode()[:200],
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_a_broken_tokenizer_is_named_when_the_model_is_loaded(content: bytes, tmp_path: Path) -> None:
    path = export(Encoder(), tmp_path / "model.pt2")
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(InvalidArtifact, match=r"tokenizer\.json"):
        load(ModelRef(ModelFormat.TORCH_EXPORT, str(path)))


@settings(max_examples=150)
@given(at=st.integers(0, len(tokenizer_json()) - 1), put=st.binary(max_size=4), cut=st.integers(0, 8))
def test_whatever_a_tokenizer_file_holds_it_is_one_or_it_is_refused(at: int, put: bytes, cut: int, tmp_path: Path) -> None:
    content = tokenizer_json().encode()
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content[:at] + put + content[at + cut :])
    with contextlib.suppress(InvalidArtifact):
        source = tokenizer.read(path)
        tokenizer.build(source.content, 8).encode_batch_fast(["the old boat"])


def test_a_text_without_a_token_is_the_callers_error(tmp_path: Path) -> None:
    with pytest.raises(InvalidTensor, match="text: has no token in it, got '  '"):
        tokens(exported(tmp_path, Encoder()), "the boat", "  ")


def test_the_tokenizer_lies_in_the_store_counts_there_and_damage_is_mended(tmp_path: Path, store: Path) -> None:
    model = exported(tmp_path, Encoder())
    index = write(model, store, HUGE)
    text = index.signature.text
    assert text is not None
    assert (store / text.tokenizer).read_text() == tokenizer_json()
    with pytest.raises(Unavailable, match="are left of the budget"):
        write(model, store, index.total_bytes + len(model.payload) + len(model.tokenizer))
    (store / text.tokenizer).write_text("{}")
    with pytest.raises(InvalidArtifact, match="damaged"):
        files.verify(store, index.digest)
    assert write(model, store, HUGE) == index
    assert files.tokenizer(store, text) == model.tokenizer
    (store / text.tokenizer).unlink()
    with pytest.raises(InvalidArtifact, match="cannot be read"):
        files.verify(store, index.digest)


def test_another_tokenizer_is_another_model(tmp_path: Path, store: Path) -> None:
    first = exported(tmp_path, Encoder())
    ref = ModelRef(ModelFormat.TORCH_EXPORT, str(tmp_path / "model.pt2"))
    name = files.ref_name(ref)
    (tmp_path / "tokenizer.json").write_text(tokenizer_json((*WORDS, "new")))
    assert files.ref_name(ref) != name
    digests = {write(model, store, HUGE).digest for model in (first, load(ref))}
    assert len(digests) == 2
    assert len(list(store.glob("*.program"))) == 1


def test_a_model_of_numbers_ignores_a_tokenizer_beside_it(pt2: Path, tmp_path: Path) -> None:
    (tmp_path / "net.pt2").write_bytes(pt2.read_bytes())
    (tmp_path / "tokenizer.json").write_text(tokenizer_json())
    model = load(ModelRef(ModelFormat.TORCH_EXPORT, str(tmp_path / "net.pt2")))
    assert model.signature.text is None
    assert model.signature.accepts == model.signature.inputs


def test_what_a_request_may_bring_names_the_text(tmp_path: Path) -> None:
    signature: Signature = exported(tmp_path, Encoder()).signature
    assert [(spec.name, spec.dtype, spec.shape) for spec in signature.accepts[2:]] == [("text", "BYTES", ("batch", 1))]
