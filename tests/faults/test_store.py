"""The host store harmed while no agent runs: bits that flip, files cut short, torn or foreign notes. Damage is found at adoption, never served."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from contracts.functions import ModelFormat, ModelRef
from models.load import load
from models.store import ref_name, verify
from models.store_writer import remember, write
from nodeagent.shell.hoststore import store_folder
from tests.faults import census
from tests.faults.real import Agent, Predictor, connected, function, source, until
from tests.nodeagent.node import Control


@dataclass(frozen=True)
class Files:
    """What the store holds of one model, and a whole model beside it."""

    weights: Path
    index: Path
    note: Path
    other: Path

    def change(self, **fields: object) -> None:
        """Rewrites fields of the index."""
        self.index.write_text(json.dumps({**json.loads(self.index.read_bytes()), **fields}))


def _flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        byte = os.pread(file.fileno(), 1, at)[0]
        os.pwrite(file.fileno(), bytes([byte ^ 0x10]), at)


def _move_tensor(files: Files, **fields: object) -> None:
    tensors = json.loads(files.index.read_bytes())["tensors"]
    files.change(tensors=[{**tensors[0], **fields}, *tensors[1:]])


def _size(path: Path) -> int:
    return path.stat().st_size


DAMAGES: dict[str, Callable[[Files], object]] = {
    "nothing is wrong": lambda files: None,
    "a bit of the first weight flips": lambda files: _flip(files.weights, 0),
    "a bit in the middle flips": lambda files: _flip(files.weights, _size(files.weights) // 2),
    "a bit of the last byte flips": lambda files: _flip(files.weights, _size(files.weights) - 1),
    "the weights are cut short": lambda files: os.truncate(files.weights, _size(files.weights) - 1),
    "the weights are cut to nothing": lambda files: os.truncate(files.weights, 0),
    "the weights are longer": lambda files: os.truncate(files.weights, _size(files.weights) + 4096),
    "the weights are another model's": lambda files: shutil.copyfile(files.other, files.weights),
    "the weights are a link to another's": lambda files: (files.weights.unlink(), files.weights.symlink_to(files.other)),
    "the weights have gone": lambda files: files.weights.unlink(),
    "the index is cut short": lambda files: os.truncate(files.index, 100),
    "the index is empty": lambda files: os.truncate(files.index, 0),
    "the index is another model's": lambda files: shutil.copyfile(files.other.with_suffix(".json"), files.index),
    "the index is of another version": lambda files: files.change(version=2),
    "the index points outside the weights": lambda files: _move_tensor(files, offset=1 << 40),
    "the index has another layout": lambda files: _move_tensor(files, name="hidden.9.weight"),
    "the index names another architecture": lambda files: files.change(program={"kind": "catalog", "source": "mlp", "config": "{}"}),
    "the index asks for a program outside": lambda files: files.change(program={"kind": "torch-export", "source": "../../etc/passwd"}),
    "the index is deep nesting": lambda files: files.index.write_text("[" * 100_000),
    "the index is a link out of the store": lambda files: (files.index.unlink(), files.index.symlink_to("/etc/passwd")),
    "the note is empty": lambda files: os.truncate(files.note, 0),
    "the note is noise": lambda files: files.note.write_bytes(bytes(range(256))),
    "the note is a path": lambda files: files.note.write_text("../../../etc/passwd"),
    "the note names what is not there": lambda files: files.note.write_text("0" * 64),
    "foreign files lie about": lambda files: [files.other.with_name(name).write_bytes(b"x") for name in FOREIGN],
}
FOREIGN = ("a.weights", "b.json", ".tmp-c", "d.ref", "e\n")
SOURCES = {name: source(number) for number, name in enumerate(DAMAGES, 1)}
OTHER = source(999)


def _write(store: Path, model: str) -> tuple[str, Path]:
    """A model in the store, as the loader writes it: its digest and its note."""
    ref = ModelRef(ModelFormat.CATALOG, model)
    index, note = write(load(ref), store, 1 << 30), ref_name(ref)
    remember(store, note, index.digest)
    return index.digest, store / note


@pytest.fixture(scope="module")
def adopted() -> Iterator[tuple[Agent, Control, Predictor, dict[str, str]]]:
    """An agent that adopts one model for each kind of damage; the digests of the undamaged models."""
    with tempfile.TemporaryDirectory(prefix="sluice-faults-", dir="/tmp") as folder:
        store = store_folder(Path(folder) / "run")
        store.mkdir(mode=0o700)
        try:
            other = store / f"{_write(store, OTHER)[0]}.weights"
            digests = {}
            for name, damage in DAMAGES.items():
                digest, note = _write(store, SOURCES[name])
                digests[name] = digest
                damage(Files(store / f"{digest}.weights", store / f"{digest}.json", note, other))
            agent = Agent(Path(folder))
        except BaseException:
            shutil.rmtree(store)
            raise
        try:
            with connected(agent) as (control, predictor):
                yield agent, control, predictor, digests
        finally:
            agent.end()


def test_a_whole_model_is_adopted_without_the_loader(adopted: tuple[Agent, Control, Predictor, dict[str, str]]) -> None:
    agent, control, predictor, digests = adopted
    weights = agent.store / f"{digests['nothing is wrong']}.weights"
    inode = weights.stat().st_ino
    control.declare(function("whole", SOURCES["nothing is wrong"]), function("other", OTHER))
    assert not agent.processes("loader")
    assert predictor.serves("default/whole", SOURCES["nothing is wrong"])
    assert predictor.serves("default/other", OTHER)
    assert weights.stat().st_ino == inode


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_found_out_before_it_is_served(name: str, adopted: tuple[Agent, Control, Predictor, dict[str, str]]) -> None:
    agent, control, predictor, digests = adopted
    key = f"damaged-{list(DAMAGES).index(name)}"
    control.declare(function(key, SOURCES[name], share=_small()))
    assert predictor.serves(f"default/{key}", SOURCES[name])
    assert verify(agent.store, digests[name]).digest == digests[name]
    assert not (agent.store / f"{digests[name]}.weights").is_symlink()


def _small() -> object:
    from contracts.functions import Share

    return Share(100, 10)


def test_nothing_foreign_is_left(adopted: tuple[Agent, Control, Predictor, dict[str, str]]) -> None:
    agent, *_ = adopted
    assert not {path.name for path in agent.store.iterdir()} & set(FOREIGN)
    assert {path.suffix for path in agent.store.iterdir()} <= {".weights", ".json", ".ref"}


def test_weights_damaged_while_they_are_served_are_read_again_after_a_lane_died(
    adopted: tuple[Agent, Control, Predictor, dict[str, str]],
) -> None:
    """Cut short under a lane, whose copy then ends in SIGBUS: the lane dies, the weights are checked and read again."""
    agent, control, predictor, _ = adopted
    model = source(50, width=256, depth=3)
    control.declare(function("served", model, share=_small()))
    assert predictor.serves("default/served", model)
    (weights,) = [path for path in agent.store.glob("*.weights") if path.stat().st_size > 400_000]
    os.truncate(weights, 0)
    census.kill(agent.processes("lane"))
    until(lambda: predictor.serves("default/served", model), lambda: f"an answer\n{agent.log.read_text()}")
    assert psutil.pid_exists(agent.process.pid)
