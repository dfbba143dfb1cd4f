from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from sluice.processes import Child, describe_exit
from tests.faults.census import alive

WITHIN_S = 60


def python(text: str) -> list[str]:
    return [sys.executable, "-c", text]


def gone(pid: int) -> bool:
    """Waits until the process has ended."""
    deadline = time.monotonic() + WITHIN_S
    with contextlib.suppress(psutil.NoSuchProcess):
        while alive(psutil.Process(pid)):
            assert time.monotonic() < deadline, f"process {pid} lives on"
            time.sleep(0.01)
    return True


@pytest.mark.asyncio
async def test_output_comes_line_by_line_and_its_end_is_kept() -> None:
    lines: list[tuple[str, str]] = []
    child = Child(
        "c", python("import sys; print('one'); print('two', file=sys.stderr); sys.stdout.write('x' * 9000)"), lambda *line: lines.append(line)
    )

    assert await child.wait() == 0
    await child.bury()

    assert {("c", "one"), ("c", "two")} <= set(lines)
    assert sum(len(text) for _, text in lines if text.startswith("x")) >= 4096
    assert "one" in child.tail


@pytest.mark.asyncio
async def test_stop_asks_first_and_a_child_that_answers_is_not_killed() -> None:
    ready = asyncio.Event()
    text = "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(7)); print('ready', flush=True); signal.pause()"
    child = Child("c", python(text), lambda *_: ready.set())
    await ready.wait()

    await child.stop(grace_s=WITHIN_S)

    assert child.returncode == 7


@pytest.mark.asyncio
async def test_a_child_that_does_not_end_is_killed() -> None:
    ready = asyncio.Event()
    text = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True)\nwhile True: signal.pause()"
    child = Child("c", python(text), lambda *_: ready.set())
    await ready.wait()

    await child.stop(grace_s=0.1)

    assert child.returncode == -signal.SIGKILL


@pytest.mark.asyncio
@pytest.mark.parametrize("killed", [False, True], ids=["after an orderly end", "after kill -9"])
async def test_what_a_child_leaves_behind_is_ended(killed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sluice.processes._BURIAL_S", 0.2)
    pids: asyncio.Queue[int] = asyncio.Queue()
    text = "import subprocess, signal; p = subprocess.Popen(['sleep', '600']); print(p.pid, flush=True); signal.pause()"
    child = Child("c", python(text), lambda _, line: pids.put_nowait(int(line)) if line.isdecimal() else None)
    orphan = await pids.get()

    if killed:
        child.kill()
        await child.wait()
        await child.bury()
    else:
        await child.stop(grace_s=WITHIN_S)

    assert gone(orphan)


def test_kill_9_of_the_parent_ends_its_children(tmp_path: Path) -> None:
    parent = subprocess.Popen(
        python(
            "import asyncio, sys\nfrom sluice.processes import Child\n"
            "async def main():\n"
            "    child = Child('c', ['sleep', '600'], print)\n    print(child.pid, flush=True)\n    await child.wait()\n"
            "asyncio.run(main())"
        ),
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())

    parent.kill()
    parent.wait()
    parent.stdout.close()

    assert gone(child)


@pytest.mark.asyncio
async def test_nothing_stays_open() -> None:
    gc.collect()
    before = set(os.listdir("/proc/self/fd"))
    for _ in range(3):
        child = Child("c", ["true"], lambda *_: None)
        await child.wait()
        await child.bury()
    with pytest.raises(FileNotFoundError):
        Child("c", ["/no/such/program"], lambda *_: None)

    assert set(os.listdir("/proc/self/fd")) <= before


def test_an_end_is_told_in_words() -> None:
    assert [describe_exit(code) for code in (0, 3, -9)] == ["ended with exit code 0", "ended with exit code 3", "was ended by SIGKILL"]
