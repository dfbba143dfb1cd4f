"""Features of graphs, held against torch's own counter on a real run, and against what can be counted by hand."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from contracts.artifact import Signature, TensorSpec
from contracts.errors import InvalidArtifact, Unavailable
from contracts.functions import ModelFormat, ModelRef
from models.load import load
from profiler.extract import extract
from profiler.features import COLUMNS, KINDS, Features, Work, decode, encode, features_of_v100_graph
from profiler.tracing import Request, answer, trace, weightless

DATA = Path(os.environ.get("SLUICE_DATA", Path(__file__).parents[3] / "shared" / "data")) / "v100-latency" / "graphs.jsonl.gz"
CATALOGUE = (
    "minilm",
    "silero-vad",
    "cnn",
    "mlp",
    "resnet50?size=64",
    "vit-b?hidden_size=64&num_attention_heads=2&image_size=64",
    "gpt2?n_embd=64&n_head=2&vocab_size=500",
)


def catalogued(source: str) -> ModelRef:
    return ModelRef(ModelFormat.CATALOG, source)


def scripted(module: nn.Module, folder: Path) -> ModelRef:
    """A module from vectors of 8 to vectors of 8, as TorchScript."""
    spec = (TensorSpec("x", "FP32", ("batch", 8)),)
    torch.jit.save(torch.jit.script(module.eval()), folder / "model.pt")
    (folder / "model.signature.json").write_bytes(msgspec.json.encode(Signature(spec, (TensorSpec("y", "FP32", ("batch", 8)),))))
    return ModelRef(ModelFormat.TORCHSCRIPT, str(folder / "model.pt"))


class Branches(nn.Module):
    """Three layers beside each other, then their sum: seven kernels, of which the longest chain has four."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.one(x)) + self.two(x) + self.three(x).view(-1, 2, 4).flatten(1)


class Curious(nn.Module):
    """Looks at what it computes."""

    def forward(self, x: Tensor) -> Tensor:
        if bool(x.sum() > 0):
            return x
        return x * 2


def test_a_perceptron_is_what_can_be_counted_by_hand() -> None:
    """Four layers of 32 between 16 inputs and 8 outputs."""
    found = trace(weightless(catalogued("mlp?features=16&width=32&depth=4&classes=8")), {})
    weights = 16 * 32 + 3 * 32 * 32 + 32 * 8
    biases = 4 * 32 + 8
    assert found.kinds["matmul"] == Work(
        kernels=5,
        weight_bytes=4 * (weights + biases),
        row_flops=2 * weights,
        fixed_bytes=4 * (weights + biases),
        row_bytes=4 * (16 + 32 + 6 * 32 + 32 + 8),
    )
    assert found.kinds["elementwise"] == Work(kernels=4, row_flops=4 * 32, row_bytes=4 * 4 * 2 * 32)
    assert (found.critical_path, found.totals(3).flops) == (9, 3 * (2 * weights + 4 * 32))


@pytest.mark.parametrize("source", CATALOGUE)
def test_products_are_those_of_torch_on_a_real_run(source: str) -> None:
    model = load(catalogued(source))
    # Attention in plain operators: torch counts no FLOPs of the processor's fused kernel.
    with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.executable(model.sample())
    found = trace(weightless(catalogued(source)), {})
    ours = sum(found.kinds[kind].flops(1) for kind in ("convolution", "grouped", "matmul", "attention") if kind in found.kinds)
    assert ours == counter.get_total_flops()
    # Counters of batches seen in training are never read.
    weights = model.executable.weights().values()
    assert found.totals(1).weight_bytes == sum(tensor.nbytes for tensor in weights if tensor.is_floating_point())


@pytest.mark.parametrize("source", CATALOGUE)
def test_work_is_a_straight_line_in_the_batch(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines through 2 and 4 rows say what lines through 3 and 8 rows say."""
    near = trace(weightless(catalogued(source)), {})
    monkeypatch.setattr("profiler.tracing._ROWS", (3, 8))
    far = trace(weightless(catalogued(source)), {})
    assert near.kinds.keys() == far.kinds.keys()
    for rows in (1, 5, 16):
        assert near.totals(rows).flops == pytest.approx(far.totals(rows).flops, rel=1e-6)
        assert near.totals(rows).bytes == pytest.approx(far.totals(rows).bytes, rel=1e-6)
    assert near.vector() == pytest.approx(far.vector(), rel=1e-5)


def test_a_named_dimension_can_be_chosen() -> None:
    short, long = (trace(weightless(catalogued("minilm")), {"seq": seq}) for seq in (16, 64))
    assert (short.sizes, long.sizes) == ({"seq": 16}, {"seq": 64})
    assert long.totals(1).flops > 4 * short.totals(1).flops
    assert long.totals(1).weight_bytes == short.totals(1).weight_bytes


def test_attention_is_one_kernel_and_moves_no_scores() -> None:
    """12 layers of GPT-2 at 512 tokens: queries, keys, values and results, 768 numbers a token each; never 512 x 512 scores a head."""
    attention = trace(weightless(catalogued("gpt2")), {"seq": 512}).kinds["attention"]
    assert attention.kernels == 12
    assert attention.row_bytes == 12 * 4 * 512 * 768 * 4


def test_the_longest_chain_is_not_the_number_of_kernels(tmp_path: Path) -> None:
    found = trace(load(scripted(Branches(), tmp_path)), {})
    assert found.totals(1).kernels == 6
    assert found.critical_path == 4


def test_every_format_is_counted_alike(tmp_path: Path) -> None:
    script = scripted(Branches(), tmp_path)
    batch = torch.export.Dim("batch")
    torch.export.save(torch.export.export(Branches().eval(), (torch.rand(2, 8),), dynamic_shapes={"x": {0: batch}}), tmp_path / "model.pt2")
    exported = ModelRef(ModelFormat.TORCH_EXPORT, str(tmp_path / "model.pt2"))
    one, other = (trace(load(ref), {}) for ref in (script, exported))
    assert one.totals(4) == other.totals(4)


def test_a_model_far_larger_than_memory_is_counted() -> None:
    """Weights of 2 TiB: they are never there."""
    found = trace(weightless(catalogued("mlp?width=524288&depth=3")), {})
    assert found.totals(1).weight_bytes > 2 << 40


def test_a_model_that_looks_at_its_activations_is_refused_with_the_reason(tmp_path: Path) -> None:
    ref = scripted(Curious(), tmp_path)
    failed = answer(msgspec.json.encode(Request(ref.format, ref.source)))
    assert not isinstance(failed, Features)
    assert failed.error[0] == "InvalidArtifact"
    assert "its graph cannot be counted without running it" in failed.error[1]
    assert failed.error[1].endswith(f"got {ref.source!r}")


@pytest.mark.parametrize(
    ("ref", "sizes", "kind", "said"),
    [
        (catalogued("resnet51"), {}, "InvalidArtifact", "is no model of the catalogue"),
        (catalogued("minilm"), {"seq": 513}, "InvalidTensor", "more tokens than the model has positions"),
        (ModelRef(ModelFormat.TORCH_EXPORT, "/nowhere/model.pt2"), {}, "InvalidArtifact", "/nowhere/model.pt2"),
    ],
    ids=["an unknown model", "too many tokens", "no such file"],
)
def test_what_cannot_be_traced_is_named(ref: ModelRef, sizes: dict[str, int], kind: str, said: str) -> None:
    failed = answer(msgspec.json.encode(Request(ref.format, ref.source, sizes)))
    assert not isinstance(failed, Features)
    assert failed.error[0] == kind
    assert said in failed.error[1]


def test_a_line_that_is_no_request_is_answered() -> None:
    failed = answer(b"{}")
    assert not isinstance(failed, Features)
    assert failed.error[0] == "ProtocolError"


def test_the_process_answers_what_was_counted_here_or_the_error() -> None:
    ref = catalogued("cnn")
    assert extract(ref) == answer(msgspec.json.encode(Request(ref.format, ref.source)))
    with pytest.raises(InvalidArtifact, match="is no model of the catalogue"):
        extract(catalogued("resnet51"))


def test_a_process_that_does_not_answer_is_said_so() -> None:
    with pytest.raises(Unavailable, match=r"cnn: its graph could not be counted: .* timed out"):
        extract(catalogued("cnn"), timeout_s=0.001)


def test_the_vector_is_finite_and_names_its_columns() -> None:
    empty, found = Features({}, 0), trace(weightless(catalogued("silero-vad")), {})
    for features in (empty, found):
        vector = features.vector(4)
        assert vector.shape == (len(COLUMNS),)
        assert np.isfinite(vector).all()
    columns = dict(zip(COLUMNS, found.vector(4), strict=True))
    assert 10 ** columns["log_kernels"] - 1 == pytest.approx(found.totals(4).kernels)
    for part in ("kernels", "flops", "bytes"):
        assert sum(columns[f"{kind}_{part}"] for kind in KINDS) == pytest.approx(1)


@pytest.mark.parametrize(
    "data",
    [b"", b"{", encode(Features({}, 1)).replace(b'"version":1', b'"version":2'), b'{"kinds": {"magic": {}}, "critical_path": 1}'],
    ids=["empty", "torn", "of another version", "of a kind there is not"],
)
def test_features_that_cannot_be_read_are_refused(data: bytes) -> None:
    with pytest.raises(InvalidArtifact, match="features"):
        decode(data)


@pytest.mark.skipif(not DATA.exists(), reason=f"the published graphs are not there ({DATA})")
def test_published_graphs_have_the_published_work() -> None:
    """Weights of ResNet-50 are those of our own; products add up to the published GMACs."""
    with gzip.open(DATA, "rt") as file:
        records = {record["model"]: record for record in map(json.loads, file)}
    for record in records.values():
        found = features_of_v100_graph(record)
        products = sum(found.kinds[kind].flops(1) for kind in ("convolution", "grouped", "matmul") if kind in found.kinds)
        assert products == pytest.approx(2e9 * record["gmacs"], rel=0.01)
        assert np.isfinite(found.vector(8)).all()
    ours, theirs = trace(weightless(catalogued("resnet50")), {}).totals(1), features_of_v100_graph(records["resnet50"]).totals(1)
    assert theirs.weight_bytes == pytest.approx(ours.weight_bytes, rel=0.01)
    assert theirs.flops == pytest.approx(ours.flops, rel=0.02)
    assert theirs.bytes == pytest.approx(ours.bytes, rel=0.2)
