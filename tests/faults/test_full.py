"""Shared memory that is really full: the agent gets a small /dev/shm of its own. A model that does not fit is a clear error that leaves nothing."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from contracts.errors import Unavailable
from tests.faults.real import Agent, Predictor, connected, function, source, until
from tests.nodeagent.node import Control

PRIVATE = ("unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o size=2m,nr_inodes=200 tmpfs /dev/shm && exec "$@"', "sh")
SMALL = source(1)


def _can_mount() -> bool:
    try:
        return subprocess.run([*PRIVATE, "true"], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


pytestmark = pytest.mark.skipif(not _can_mount(), reason="mounting in a private namespace is not permitted here (it takes root)")


class Shm:
    """The /dev/shm that the agent alone sees."""

    def __init__(self, agent: Agent) -> None:
        self.run_dir = agent.run_dir
        self.path = Path(f"/proc/{agent.process.pid}/root/dev/shm")
        self.store = self.path / agent.store.name
        self._filler = self.path / "filler"
        self._before = self._names()

    def fill(self, free_bytes: int = 0) -> None:
        """Takes all of it but `free_bytes`."""
        self.free()
        with self._filler.open("wb") as file:
            status = os.statvfs(self.path)
            os.posix_fallocate(file.fileno(), 0, max(1, status.f_bavail * status.f_frsize - free_bytes))

    def free(self) -> None:
        """Gives back what `fill` took."""
        self._filler.unlink(missing_ok=True)

    def take_inodes(self) -> None:
        """Makes files until there can be no more."""
        (self.path / "files").mkdir()
        for number in range(1000):
            try:
                (self.path / "files" / str(number)).touch()
            except OSError:
                return
        raise AssertionError("there are always more inodes")

    def holds_only_the_small(self) -> None:
        """Waits until the store holds what it held at the beginning."""
        until(lambda: self._names() == self._before, lambda: f"left behind: {self._names() - self._before}")

    def _names(self) -> set[str]:
        return {path.name for path in self.store.iterdir()}


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[Control, Predictor, Shm]]:
    """An agent that serves a small model, and whose budget is larger than its shared memory."""
    with tempfile.TemporaryDirectory(prefix="sluice-faults-", dir="/tmp") as folder:
        agent = Agent(Path(folder), host="64Mi", prefix=PRIVATE)
        try:
            with connected(agent) as (control, predictor):
                control.declare(function("small", SMALL))
                assert predictor.serves("default/small", SMALL)
                yield control, predictor, Shm(agent)
        finally:
            agent.end()


def still_serves(predictor: Predictor) -> None:
    assert predictor.serves("default/small", SMALL)


def test_a_model_that_does_not_fit_is_refused_with_its_size(served: tuple[Control, Predictor, Shm]) -> None:
    control, predictor, shm = served
    with pytest.raises(Unavailable, match=r"no room for 3\.6 MiB"):
        control.declare(function("large", "mlp"))
    shm.holds_only_the_small()
    still_serves(predictor)
    control.remove("default/large")


def test_wherever_the_memory_ends_the_model_is_whole_or_not_there(served: tuple[Control, Predictor, Shm]) -> None:
    """Room for weights, index and note runs out at each page in turn."""
    control, predictor, shm = served
    fits = []
    for pages in range(14):
        shm.fill(pages * 4096)
        fits.append(_declare(control))
        if fits[-1]:
            assert predictor.serves("default/next", source(2))
        else:
            shm.holds_only_the_small()
        still_serves(predictor)
        control.remove("default/next")
    shm.free()
    assert fits == sorted(fits)
    assert set(fits) == {False, True}


def _declare(control: Control) -> bool:
    """Whether there is room for one more model."""
    try:
        control.declare(function("next", source(2)))
    except Unavailable as error:
        if "no room" not in error.message:
            raise
        return False
    return True


def test_without_inodes_it_is_refused_too_and_serves_again_when_there_are_some(served: tuple[Control, Predictor, Shm]) -> None:
    control, predictor, shm = served
    shm.take_inodes()
    with pytest.raises(Unavailable, match="No space left"):
        control.declare(function("next", source(3)))
    shm.holds_only_the_small()
    still_serves(predictor)
    for path in (shm.path / "files").iterdir():
        path.unlink()
    (shm.path / "files").rmdir()
    control.declare(function("next", source(3)))
    assert predictor.serves("default/next", source(3))
    control.remove("default/next")


def test_a_full_memory_does_not_keep_a_declared_function_from_serving(served: tuple[Control, Predictor, Shm]) -> None:
    _, predictor, shm = served
    shm.fill()
    still_serves(predictor)
    late = Predictor(shm.run_dir)
    assert late.receive()
    assert late.serves("default/small", SMALL)
    late.close()
    shm.free()
