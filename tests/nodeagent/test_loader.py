from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import psutil
import pytest

from contracts.functions import ModelFormat, ModelRef
from nodeagent.shell.loader import Loader
from tests.faults.census import alive, command

FAKE = "tests.nodeagent.fake_loader"


def model(value: int) -> ModelRef:
    return ModelRef(ModelFormat.TORCH_EXPORT, f"file:///add?value={value}")


def loaders() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if FAKE in command(child)]


@pytest.mark.asyncio
async def test_an_idle_loader_ends_by_itself_and_the_next_model_starts_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nodeagent.shell.loader._IDLE_S", 600.0)
    loader = Loader((sys.executable, "-m", FAKE, "--store", str(tmp_path)))
    digests = {await loader.load(model(1), 1 << 20)}
    (first,) = loaders()
    digests.add(await loader.load(model(2), 1 << 20))
    assert loaders() == [first], "one process loads one model after another"
    monkeypatch.setattr("nodeagent.shell.loader._IDLE_S", 0.1)
    digests.add(await loader.load(model(3), 1 << 20))
    async with asyncio.timeout(60):
        while alive(first):
            await asyncio.sleep(0.01)
    digests.add(await loader.load(model(4), 1 << 20))
    assert len(digests) == 4
    await loader.close()
    assert loaders() == []


@pytest.mark.asyncio
async def test_a_loader_writes_from_the_processors_near_the_devices(tmp_path: Path) -> None:
    near = {max(os.sched_getaffinity(0))}
    loader = Loader((sys.executable, "-m", FAKE, "--store", str(tmp_path)), near)
    await loader.load(model(1), 1 << 20)
    (process,) = loaders()
    assert set(process.cpu_affinity()) == near
    await loader.close()
