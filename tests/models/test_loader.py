"""The loader process: one line in, one line out, whatever the line."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from contracts.functions import ModelFormat, ModelRef
from models import store as files


class Loader:
    """A running loader."""

    def __init__(self, store: Path) -> None:
        command = [sys.executable, "-m", "models.loader", "--store", str(store)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def ask(self, line: bytes) -> Any:
        """The reply to one line."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(line + b"\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def load(self, id_: int, source: str, format_: str = "sluice-catalog", limit_bytes: int = 1 << 30) -> Any:
        """The reply to one request."""
        return self.ask(json.dumps({"id": id_, "format": format_, "source": source, "limit_bytes": limit_bytes}).encode())


@pytest.fixture
def loader(store: Path) -> Iterator[Loader]:
    """A loader over an empty store."""
    running = Loader(store)
    try:
        yield running
    finally:
        running.process.kill()
        running.process.communicate()


def test_it_loads_one_after_the_other_and_ends_with_its_input(loader: Loader, store: Path, pt2: Path) -> None:
    digests = [loader.load(seed, f"mlp?width=32&seed={seed}") for seed in range(1, 41)]
    assert [reply["id"] for reply in digests] == list(range(1, 41))
    assert len({reply["digest"] for reply in digests}) == 40
    for reply in (digests[0], loader.load(41, str(pt2), "torch-export")):
        assert files.verify(store, reply["digest"]).total_bytes == reply["bytes"]
    again = loader.load(42, "mlp?width=32&seed=1")
    assert again["digest"] == digests[0]["digest"]
    assert files.find(store, ModelRef(ModelFormat.CATALOG, "mlp?width=32&seed=7")) is not None
    loader.process.communicate(timeout=30)
    assert loader.process.returncode == 0


def test_every_error_is_a_reply_and_the_next_request_is_served(loader: Loader, store: Path, tmp_path: Path) -> None:
    (tmp_path / "foreign.pt2").write_bytes(b"PK")
    asked = [
        (loader.load(1, "nothing"), "InvalidArtifact", "resnet50"),
        (loader.load(2, "mlp", limit_bytes=1000), "Unavailable", "left of the budget"),
        (loader.load(3, str(tmp_path / "foreign.pt2"), "torch-export"), "InvalidArtifact", "foreign.pt2"),
        (loader.load(4, str(tmp_path / "absent.pt2"), "torch-export"), "InvalidArtifact", "absent.pt2"),
        (loader.ask(b"nonsense"), "ProtocolError", "no request"),
        (loader.load(5, "mlp", format_="pickle"), "ProtocolError", "no request"),
    ]
    for reply, kind, words in asked:
        assert reply["error"][0] == kind
        assert words in reply["error"][1]
    assert list(store.iterdir()) == []
    assert loader.load(7, "mlp")["bytes"] > 0


def test_it_removes_what_a_killed_loader_left(store: Path) -> None:
    (store / f"{files.TEMPORARY}abc").write_bytes(b"half")
    running = Loader(store)
    assert running.load(1, "mlp?width=32")["id"] == 1
    running.process.communicate()
    assert not list(store.glob(f"{files.TEMPORARY}*"))
