"""The host store: whole or nothing, found again by reference, verified by digest."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from contracts.errors import InvalidArtifact, Unavailable
from contracts.functions import ModelFormat, ModelRef
from models import store as files
from models.load import Loaded, load
from models.program import build
from models.store_writer import remember, write

MLP = ModelRef(ModelFormat.CATALOG, "mlp?width=64&seed=1")
HUGE = 1 << 40


def _names(store: Path) -> list[str]:
    return sorted(path.name for path in store.iterdir())


@pytest.fixture
def loaded() -> Loaded:
    """A small network."""
    return load(MLP)


def test_a_model_is_three_facts_in_the_store_and_its_index_says_where_everything_lies(loaded: Loaded, store: Path) -> None:
    index = write(loaded, store, HUGE)
    assert _names(store) == sorted([f"{index.digest}.json", f"{index.digest}.weights"])
    assert os.path.getsize(store / f"{index.digest}.weights") == index.total_bytes
    assert {entry.name for entry in index.tensors} == set(loaded.executable.weights())
    assert all(entry.offset % 256 == 0 for entry in index.tensors)
    assert index.gates[0].module == ""
    assert index.run_ns > 0
    assert files.verify(store, index.digest) == index


def test_writing_again_reuses_the_files(loaded: Loaded, store: Path) -> None:
    first = write(loaded, store, HUGE)
    inode = (store / f"{first.digest}.weights").stat().st_ino
    assert write(load(MLP), store, HUGE) == first
    assert (store / f"{first.digest}.weights").stat().st_ino == inode
    assert len(_names(store)) == 2


def test_a_damaged_file_is_seen_and_written_anew(loaded: Loaded, store: Path) -> None:
    index = write(loaded, store, HUGE)
    with open(store / f"{index.digest}.weights", "r+b") as file:
        file.seek(index.tensors[2].offset)
        file.write(b"\x01\x02\x03")
    with pytest.raises(InvalidArtifact, match="damaged"):
        files.verify(store, index.digest)
    assert write(loaded, store, HUGE) == index
    assert files.verify(store, index.digest) == index


@pytest.mark.parametrize("content", [b"", b"{}", b"\x00" * 50, b'{"digest": 5}'], ids=["empty", "no fields", "zeros", "wrong types"])
def test_a_torn_index_is_refused(content: bytes, loaded: Loaded, store: Path) -> None:
    index = write(loaded, store, HUGE)
    (store / f"{index.digest}.json").write_bytes(content)
    with pytest.raises(InvalidArtifact):
        files.read_index(store, index.digest)


@pytest.mark.parametrize("digest", ["../../etc/passwd", "", "A" * 64, "0" * 63, "0" * 64])
def test_a_name_that_is_no_digest_never_becomes_a_path(digest: str, store: Path) -> None:
    with pytest.raises(InvalidArtifact):
        files.read_index(store, digest)


def test_a_program_that_names_a_path_or_is_damaged_is_refused(pt2: Path, store: Path) -> None:
    import msgspec

    index = write(load(ModelRef(ModelFormat.TORCH_EXPORT, str(pt2))), store, HUGE)
    foreign = msgspec.structs.replace(index, program=msgspec.structs.replace(index.program, source="../secret.program"))
    with pytest.raises(InvalidArtifact, match="no name of a program file"):
        build(foreign, store)
    (store / index.program.source).write_bytes(b"{}")
    with pytest.raises(InvalidArtifact, match="damaged"):
        build(index, store)


def test_a_program_file_holds_no_weights(pt2: Path, torchscript: Path, store: Path) -> None:
    for format_, path in ((ModelFormat.TORCH_EXPORT, pt2), (ModelFormat.TORCHSCRIPT, torchscript)):
        model = load(ModelRef(format_, str(path)))
        assert 0 < len(model.payload) < 32_768
        index = write(model, store, HUGE)
        assert (store / index.program.source).read_bytes() == model.payload


def test_more_than_the_budget_is_refused_with_both_sizes_and_leaves_nothing(loaded: Loaded, store: Path) -> None:
    with pytest.raises(Unavailable, match=r"takes .* KiB of host memory, 1.0 KiB are left"):
        write(loaded, store, 1024)
    assert _names(store) == []


def test_a_full_store_is_an_error_and_leaves_nothing(loaded: Loaded, store: Path) -> None:
    """A file size limit stands for the full file system: fallocate fails in the same place."""
    code = (
        "import resource, signal, sys; from pathlib import Path; from contracts.errors import Unavailable;"
        "from contracts.functions import *; from models.load import load; from models.store_writer import write;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096));"
        f"loaded = load(ModelRef(ModelFormat.CATALOG, {MLP.source!r}))\n"
        "try:\n    write(loaded, Path(sys.argv[1]), 1 << 40)\n"
        "except Unavailable as error:\n    print(error.message)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(store)], capture_output=True, text=True, check=True)
    assert "no room for" in done.stdout
    assert _names(store) == []
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 4096


@pytest.mark.parametrize("failing", ["rename", "program"])
def test_any_failure_on_the_way_leaves_nothing(failing: str, pt2: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(ModelRef(ModelFormat.TORCH_EXPORT, str(pt2)))
    write(model, store, HUGE)
    for path in store.iterdir():
        path.unlink()
    calls = 0

    def rename(self: Path, target: Path) -> Path:
        nonlocal calls
        calls += 1
        if calls == (1 if failing == "program" else 3):
            raise OSError(28, "No space left on device")
        os.rename(self, target)
        return target

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(Unavailable, match="no room"):
        write(model, store, HUGE)
    assert _names(store) == []


def test_a_reference_finds_its_model_again_until_its_file_changes(pt2: Path, store: Path, tmp_path: Path) -> None:
    path = tmp_path / "net.pt2"
    path.write_bytes(pt2.read_bytes())
    ref = ModelRef(ModelFormat.TORCH_EXPORT, path.as_uri())
    assert files.find(store, ref) is None
    index = write(load(ref), store, HUGE)
    remember(store, files.ref_name(ref), index.digest)
    assert files.find(store, ref) == index
    os.utime(path, ns=(1, 1))
    assert files.find(store, ref) is None


def test_a_changed_configuration_is_another_reference(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "model.safetensors"
    save_file(load(MLP).executable.weights(), path)
    (tmp_path / "config.json").write_text(json.dumps({"sluice_architecture": "mlp", "sluice_arguments": {"width": 64}}))
    for source in (str(path), str(tmp_path)):
        ref = ModelRef(ModelFormat.SAFETENSORS, source)
        before = files.ref_name(ref)
        os.utime(tmp_path / "config.json", ns=(1, hash(source) & 0xFFFF))
        assert files.ref_name(ref) != before


def test_tied_weights_lie_in_the_store_once(pt2: Path, torchscript: Path, store: Path) -> None:
    for format_, path in ((ModelFormat.TORCH_EXPORT, pt2), (ModelFormat.TORCHSCRIPT, torchscript)):
        index = write(load(ModelRef(format_, str(path))), store, HUGE)
        assert sum(entry.shape == (8, 8) for entry in index.tensors) == 1
