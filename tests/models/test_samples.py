"""Sample inputs fit the signatures, differ by seed, and look like what they stand for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from contracts.functions import ModelFormat, ModelRef
from models import catalogue
from models.describe import describe
from models.samples import sample_inputs

_NAMES = {"float32": "FP32", "int64": "INT64"}


@pytest.mark.parametrize("name", catalogue.ENTRIES)
@pytest.mark.parametrize("rows", [1, 4])
def test_samples_fit_the_signature_and_follow_the_seed(name: str, rows: int) -> None:
    ref = ModelRef(ModelFormat.CATALOG, name)
    arrays = sample_inputs(ref, rows, seed=1)
    sizes = describe(ref).signature.bind({key: (_NAMES[str(array.dtype)], array.shape) for key, array in arrays.items()})
    assert sizes["batch"] == rows
    again, other = sample_inputs(ref, rows, seed=1), sample_inputs(ref, rows, seed=2)
    assert all(np.array_equal(arrays[key], again[key]) for key in arrays)
    assert any(arrays[key].shape != other[key].shape or not np.array_equal(arrays[key], other[key]) for key in arrays)


def test_sentences_have_different_lengths_and_are_masked() -> None:
    arrays = sample_inputs(ModelRef(ModelFormat.CATALOG, "minilm"), 16, seed=3)
    lengths = arrays["attention_mask"].sum(1)
    assert len(set(lengths.tolist())) > 3
    assert all(row[0] == 101 and row[length - 1] == 102 for row, length in zip(arrays["input_ids"], lengths, strict=True))


def test_files_have_samples_too(pt2: Path, torchscript: Path) -> None:
    for format_, path in ((ModelFormat.TORCH_EXPORT, pt2), (ModelFormat.TORCHSCRIPT, torchscript)):
        arrays = sample_inputs(ModelRef(format_, str(path)), 3, seed=1)
        assert {key: array.shape for key, array in arrays.items()} == {"x": (3, 8), "y": (3, 8)}
