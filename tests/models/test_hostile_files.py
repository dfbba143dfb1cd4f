"""Broken, truncated and foreign files: an InvalidArtifact that names the file, and nothing of theirs is ever executed."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from contracts.artifact import Signature, TensorSpec
from contracts.errors import InvalidArtifact, InvalidTensor
from contracts.functions import ModelFormat, ModelRef
from models.load import load

FUZZ = settings(max_examples=60)
EXPORT, SCRIPT, SAFE = ModelFormat.TORCH_EXPORT, ModelFormat.TORCHSCRIPT, ModelFormat.SAFETENSORS


class Trap:
    """A pickle that leaves a mark where it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        """Creates the mark on loading."""
        return open, (str(self.mark), "w")


@pytest.fixture
def safetensors(tmp_path: Path) -> Path:
    """A catalogued network as safetensors."""
    weights = load(ModelRef(ModelFormat.CATALOG, "mlp?width=8&depth=1&features=4&classes=2")).executable.weights()
    path = tmp_path / "model.safetensors"
    save_file(weights, path)
    sizes = {"width": 8, "depth": 1, "features": 4, "classes": 2}
    path.with_name("config.json").write_text(json.dumps({"sluice_architecture": "mlp", "sluice_arguments": sizes}))
    return path


@pytest.fixture
def files(pt2: Path, torchscript: Path, safetensors: Path, tmp_path: Path) -> dict[ModelFormat, Path]:
    """Copies of a good file of each format, to be spoiled."""
    copies = {SAFE: safetensors}
    for format_, path in ((EXPORT, pt2), (SCRIPT, torchscript)):
        copies[format_] = Path(shutil.copy(path, tmp_path))
    shutil.copy(torchscript.with_name("net.signature.json"), tmp_path)
    return copies


def _refused(format_: ModelFormat, path: Path, *words: str) -> None:
    with pytest.raises(InvalidArtifact) as caught:
        load(ModelRef(format_, str(path)))
    for word in words:
        assert word in caught.value.message


def _rewrite(path: Path, change: Callable[[str, bytes], bytes | None], *more: tuple[str, bytes]) -> None:
    """Writes an archive again, each record as `change(name below the folder, content)` says, with more records at its end."""
    with zipfile.ZipFile(path) as archive:
        folder = archive.namelist()[0].partition("/")[0]
        records = [(name.partition("/")[2], archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in [*records, *more]:
            if (changed := change(name, content)) is not None:
                archive.writestr(f"{folder}/{name}", changed)


def _edit_program(path: Path, edit: Callable[[Any], None]) -> None:
    def change(name: str, content: bytes) -> bytes:
        if name != "models/model.json":
            return content
        document = json.loads(content)
        edit(document)
        return json.dumps(document).encode()

    _rewrite(path, change)


@pytest.mark.parametrize("format_", [EXPORT, SCRIPT, SAFE])
def test_good_files_load(format_: ModelFormat, files: dict[ModelFormat, Path]) -> None:
    assert load(ModelRef(format_, files[format_].as_uri())).executable.weights()


@FUZZ
@given(data=st.data(), format_=st.sampled_from([EXPORT, SCRIPT, SAFE]))
def test_a_truncated_file_is_refused(data: st.DataObject, format_: ModelFormat, files: dict[ModelFormat, Path]) -> None:
    content = files[format_].read_bytes()
    broken = files[format_].with_name("broken" + files[format_].suffix)
    broken.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    shutil.copy(files[SCRIPT].with_name("net.signature.json"), broken.with_suffix(".signature.json"))
    _refused(format_, broken, str(broken))


@FUZZ
@given(data=st.data(), format_=st.sampled_from([EXPORT, SCRIPT, SAFE]))
def test_flipped_bits_are_refused_or_harmless(data: st.DataObject, format_: ModelFormat, files: dict[ModelFormat, Path]) -> None:
    content = bytearray(files[format_].read_bytes())
    place = data.draw(st.integers(0, len(content) - 1) | st.integers(0, 300) | st.integers(len(content) - 300, len(content) - 1))
    content[place] ^= 1 << data.draw(st.integers(0, 7))
    broken = files[format_].with_name("broken" + files[format_].suffix)
    broken.write_bytes(content)
    shutil.copy(files[SCRIPT].with_name("net.signature.json"), broken.with_suffix(".signature.json"))
    with contextlib.suppress(InvalidArtifact):
        load(ModelRef(format_, str(broken)))


@pytest.mark.parametrize("format_", [EXPORT, SCRIPT, SAFE])
@pytest.mark.parametrize(
    "content",
    [b"", b"not a model", b"\x7fELF" + bytes(100), b"PK\x05\x06" + bytes(18), b"\xff" * 4096, pickle.dumps([1, 2]), b"[" * 100_000],
    ids=["empty", "text", "a program", "an empty zip", "ones", "a pickle", "deep JSON"],
)
def test_a_foreign_file_is_refused(format_: ModelFormat, content: bytes, files: dict[ModelFormat, Path]) -> None:
    files[format_].write_bytes(content)
    _refused(format_, files[format_], str(files[format_]))


@pytest.mark.parametrize("format_", [EXPORT, SCRIPT, SAFE])
def test_a_pickle_under_a_models_name_is_not_loaded(format_: ModelFormat, files: dict[ModelFormat, Path], tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    torch.save(Trap(mark), files[format_])
    _refused(format_, files[format_], str(files[format_]))
    files[format_].write_bytes(pickle.dumps(Trap(mark)))
    _refused(format_, files[format_], str(files[format_]))
    assert not mark.exists()


def test_pickles_inside_an_exported_program_are_never_loaded(files: dict[ModelFormat, Path], tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    buffer = io.BytesIO()
    torch.save((Trap(mark),), buffer)
    path = files[EXPORT]
    _rewrite(path, lambda name, content: buffer.getvalue() if name.startswith("data/sample_inputs") else content)
    assert load(ModelRef(EXPORT, str(path))).executable.weights()
    _rewrite(path, lambda name, content: content.replace(b'"use_pickle": false', b'"use_pickle": true') if name.endswith("config.json") else content)
    _refused(EXPORT, path, "pickled")
    assert not mark.exists()


def test_what_an_exported_program_would_evaluate_is_data_here(files: dict[ModelFormat, Path], tmp_path: Path) -> None:
    """The guards, shape expressions, node names and tree specifications that torch.export.load evaluates leave no mark."""
    mark = tmp_path / "mark"
    attack = f"open({str(mark)!r}, 'w')"

    def edit(document: Any) -> None:
        document["guards_code"] = [attack]
        graph = document["graph_module"]["graph"]
        for meta in graph["tensor_values"].values():
            for size in meta["sizes"]:
                if "as_expr" in size:
                    size["as_expr"]["expr_str"] = attack
        graph["nodes"][0]["metadata"]["torch_fn"] = attack
        graph["nodes"][0]["name"] = f"x = {attack}"

    _edit_program(files[EXPORT], edit)
    loaded = load(ModelRef(EXPORT, str(files[EXPORT])))
    loaded.run(loaded.sample())
    assert not mark.exists()


@pytest.mark.parametrize(
    "target",
    [
        "torch.os.system",
        "torch.load",
        "torch.hub.load",
        "torch.ops.aten.from_file.default",
        "torch.ops.aten.__class__.mro",
        "#x:y",
        "math.pow",
        "_operator.attrgetter",
    ],
)
def test_an_exported_program_may_call_only_tensor_operators(target: str, files: dict[ModelFormat, Path]) -> None:
    def edit(document: Any) -> None:
        document["graph_module"]["graph"]["nodes"][1]["target"] = target

    _edit_program(files[EXPORT], edit)
    _refused(EXPORT, files[EXPORT], target)


def test_an_exported_program_that_writes_to_a_weight_is_refused(tmp_path: Path) -> None:
    class Counter(torch.nn.Module):
        count: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.count.view(2, 2).add_(1.0)
            return x + self.count

    path = tmp_path / "counter.pt2"
    torch.export.save(torch.export.export(Counter(), (torch.zeros(4),)), path)
    _refused(EXPORT, path, "writes to")


def test_an_exported_program_refuses_sizes_it_was_not_exported_for(tmp_path: Path, net: torch.nn.Module) -> None:
    batch = torch.export.Dim("batch", min=2, max=4)
    path = tmp_path / "net.pt2"
    torch.export.save(torch.export.export(net, (torch.rand(3, 8), torch.rand(3, 8)), dynamic_shapes=[{0: batch}, {0: batch}]), path)
    loaded = load(ModelRef(EXPORT, str(path)))
    assert loaded.run({"x": torch.rand(4, 8), "y": torch.rand(4, 8)})["scores"].shape == (4, 4)
    with pytest.raises(InvalidTensor, match="exported for"):
        loaded.run({"x": torch.rand(5, 8), "y": torch.rand(5, 8)})


def test_a_compressed_archive_is_refused_before_it_is_read(files: dict[ModelFormat, Path]) -> None:
    for format_ in (EXPORT, SCRIPT):
        with zipfile.ZipFile(files[format_], "w", zipfile.ZIP_DEFLATED) as bomb:
            bomb.writestr("net/data/0", bytes(64 << 20))
        assert files[format_].stat().st_size < 1 << 20
        _refused(format_, files[format_], "compressed")


def test_a_records_place_given_twice_is_refused(files: dict[ModelFormat, Path]) -> None:
    with pytest.warns(UserWarning, match="Duplicate"):
        _rewrite(files[EXPORT], lambda _name, content: content, ("archive_format", b"pt2"))
    _refused(EXPORT, files[EXPORT], str(files[EXPORT]))


def test_a_weight_that_reaches_beyond_its_record_is_refused(files: dict[ModelFormat, Path]) -> None:
    def change(name: str, content: bytes) -> bytes:
        return (
            content.replace(b'"sizes": [{"as_int": 8}, {"as_int": 8}]', b'"sizes": [{"as_int": 8}, {"as_int": 9999999}]')
            if "config" in name
            else content
        )

    _rewrite(files[EXPORT], change)
    _refused(EXPORT, files[EXPORT], str(files[EXPORT]))


HOSTILE_SCRIPTS = {"a file is written": "torch.save(x, 'PATH')", "a file is mapped": "x = torch.from_file('PATH', True, 10)"}


@pytest.mark.parametrize("call", HOSTILE_SCRIPTS.values(), ids=HOSTILE_SCRIPTS)
def test_a_script_that_reaches_for_files_is_refused(call: str, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    module = type(f"Hostile{len(call)}", (torch.jit.ScriptModule,), {})()
    module.define(f"def forward(self, x: Tensor) -> Tensor:\n  {call.replace('PATH', str(mark))}\n  return x\n")
    path = tmp_path / "hostile.pt"
    torch.jit.save(module, path)
    _sign(path)
    _refused(SCRIPT, path, "no operator that is served", str(path))
    assert not mark.exists()


def test_a_script_with_code_that_runs_on_loading_is_refused(files: dict[ModelFormat, Path]) -> None:
    extra = b"\n  def __setstate__(self, state: int) -> NoneType:\n    return None\n"
    _rewrite(files[SCRIPT], lambda name, content: content + extra if name == "code/__torch__/conftest.py" or name.endswith("linear.py") else content)
    _refused(SCRIPT, files[SCRIPT], "__setstate__")


def test_a_frozen_script_is_refused_because_its_weights_cannot_be_swapped(tmp_path: Path) -> None:
    with torch.no_grad():
        frozen = torch.jit.freeze(torch.jit.script(torch.nn.Linear(1500, 1500).eval()))
    path = tmp_path / "frozen.pt"
    torch.jit.save(frozen, path)
    _sign(path)
    _refused(SCRIPT, path, "frozen")


def _sign(path: Path) -> None:
    spec = TensorSpec("x", "FP32", ("batch", 4))
    path.with_suffix(".signature.json").write_bytes(msgspec.json.encode(Signature((spec,), (spec,))))


def test_a_script_without_a_signature_is_told_what_it_lacks(files: dict[ModelFormat, Path]) -> None:
    files[SCRIPT].with_name("net.signature.json").unlink()
    _refused(SCRIPT, files[SCRIPT], "signature.json", str(files[SCRIPT]))


CONFIGS = {
    "no JSON": ("{", "config.json"),
    "no object": ("[]", "object"),
    "an architecture that nobody knows": ('{"model_type": "llama"}', "llama"),
    "an argument that nobody knows": ('{"sluice_architecture": "mlp", "sluice_arguments": {"code": "exec"}}', "code"),
    "other sizes than the weights have": ('{"sluice_architecture": "mlp"}', "must be"),
    "another architecture than the weights have": ('{"sluice_architecture": "cnn"}', "lacks the tensor"),
}


@pytest.mark.parametrize(("config", "named"), CONFIGS.values(), ids=CONFIGS)
def test_a_configuration_that_does_not_fit_is_refused(config: str, named: str, safetensors: Path) -> None:
    safetensors.with_name("config.json").write_text(config)
    _refused(SAFE, safetensors, named, str(safetensors.parent))


@pytest.mark.parametrize(
    "source", ["relative/model.pt2", "http://host/model.pt2", "file://host/model.pt2", "s3://bucket/model.pt2", "file:model.pt2", ""]
)
def test_only_local_files_are_loaded(source: str) -> None:
    with pytest.raises(InvalidArtifact, match="storageUri"):
        load(ModelRef(EXPORT, source))
