from __future__ import annotations

import os
from pathlib import Path

import pytest

from contracts.errors import SluiceError
from sluice.rundir import RunDir


def test_it_is_made_private_and_removed_with_the_store_and_all_it_holds(tmp_path: Path) -> None:
    store = tmp_path / "store"
    store.mkdir()
    (store / "a.weights").write_bytes(b"1")
    held = RunDir(tmp_path / "run" / "node", store)
    assert held.path.stat().st_mode & 0o777 == 0o700
    (held.path / "demo").mkdir()
    (held.path / "demo" / "x").touch()
    (held.path / "link").symlink_to(tmp_path)

    held.remove()

    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["run"]
    assert list((tmp_path / "run").iterdir()) == []


def test_a_second_supervisor_is_told_who_holds_it(tmp_path: Path) -> None:
    held = RunDir(tmp_path / "node", tmp_path / "store")

    with pytest.raises(SluiceError, match=f"runs at .* already .process {os.getpid()}"):
        RunDir(tmp_path / "node", tmp_path / "store")

    held.remove()
    RunDir(tmp_path / "node", tmp_path / "store").remove()


def test_a_directory_that_others_can_enter_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "node").mkdir(mode=0o755)

    with pytest.raises(SluiceError, match="not private"):
        RunDir(tmp_path / "node", tmp_path / "store")


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "node").symlink_to(tmp_path / "real")

    with pytest.raises(SluiceError, match="not private"):
        RunDir(tmp_path / "node", tmp_path / "store")


def test_a_path_too_long_for_a_socket_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(SluiceError, match="too long"):
        RunDir(tmp_path / ("x" * 120), tmp_path / "store")
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(SluiceError, match=r"cannot use the run directory .*file/node"):
        RunDir(tmp_path / "file" / "node", tmp_path / "store")
