"""A private MPS daemon and what ties it to the agent, against the fake control program: real processes, sockets and signals."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from contracts.errors import Unavailable
from nodeagent.shell.mps import PATH_BYTES, MpsDaemon
from tests.faults.census import alive
from tests.nodeagent.node import REPOSITORY, eventually

CONTROL = (sys.executable, "-S", str(REPOSITORY / "tests" / "fakes" / "mps_control.py"))
CLIENT = "import sys; sys.path.insert(0, sys.argv[1]); from tests.fakes import gpu; print(gpu.sms(), flush=True); sys.stdin.read()"


def client(daemon: MpsDaemon, **environment: str) -> subprocess.Popen[str]:
    """A process that is a client of the daemon."""
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, "-c", CLIENT, str(REPOSITORY)], stdin=pipe, stdout=pipe, text=True, env={**os.environ, **daemon.environment, **environment}
    )


def children() -> set[psutil.Process]:
    """All processes that this one has started, and theirs."""
    return set(psutil.Process().children(recursive=True))


def said(process: subprocess.Popen[str]) -> str:
    """Its first line."""
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.mark.asyncio
async def test_a_daemon_serves_clients_of_its_folder_and_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", "/tmp/somebody-else-s")
    monkeypatch.setenv("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", "10")
    daemon = MpsDaemon(CONTROL, folder, "GPU-1")
    others = children()
    await daemon.start()
    family = children() - others
    with client(daemon, CUDA_MPS_ACTIVE_THREAD_PERCENTAGE="50") as first:
        assert said(first) == "66"
        assert await daemon.clients() == {first.pid}
        assert not await daemon.faulted()
        await daemon.terminate_client(first.pid)
        assert first.wait(60) == 1
    await daemon.stop()
    assert daemon.died.is_set()
    assert not any(alive(process) for process in family)
    assert not os.listdir(folder)


@pytest.mark.asyncio
async def test_a_daemon_that_is_not_on_the_path_looks_for_its_server_where_it_lies_itself(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = folder / "mounted"
    place.mkdir()
    program = place / "far-control"
    program.write_text(f'#!/bin/sh\nexec {" ".join(CONTROL)} "$@"\n')
    program.chmod(0o700)
    monkeypatch.setattr("nodeagent.shell.mps._PLACES", str(place))
    others = children()
    daemon = MpsDaemon(("far-control",), folder, "GPU-1")
    await daemon.start()
    assert all(str(place) in process.environ()["PATH"].split(":") for process in children() - others)
    await daemon.stop()


@pytest.mark.asyncio
async def test_the_longest_of_its_names_is_what_the_run_dir_leaves_room_for(folder: Path) -> None:
    daemon = MpsDaemon(CONTROL, folder, "GPU-1")
    await daemon.start()
    name = f"{daemon.environment['CUDA_MPS_PIPE_DIRECTORY']}/nvidia-cuda-mps-control.pid"
    assert len(os.fsencode(name)) == len(os.fsencode(folder)) + PATH_BYTES
    await daemon.stop()


@pytest.mark.asyncio
@pytest.mark.parametrize("victim", ["--server", "-f"], ids=["server", "daemon"])
async def test_the_death_of_daemon_or_server_is_noticed(victim: str, folder: Path) -> None:
    daemon = MpsDaemon(CONTROL, folder, "GPU-1")
    others = children()
    await daemon.start()
    family = children() - others
    next(process for process in family if process.cmdline()[-1] == victim and "tether" not in " ".join(process.cmdline())).kill()
    await asyncio.wait_for(daemon.died.wait(), 60)
    await daemon.stop()
    assert not any(alive(process) for process in family)


@pytest.mark.asyncio
async def test_a_fault_is_found_by_asking_and_a_daemon_that_has_gone_counts_as_one(folder: Path) -> None:
    daemon = MpsDaemon(CONTROL, folder, "GPU-1")
    others = children()
    await daemon.start()
    server = next(process for process in children() - others if process.cmdline()[-1] == "--server")
    with client(daemon) as lost:
        assert said(lost) == "132"
        server.send_signal(signal.SIGUSR1)
        assert lost.wait(60) == 1
    assert await daemon.faulted()
    server.kill()
    await asyncio.wait_for(daemon.died.wait(), 60)
    assert await daemon.faulted()
    assert await daemon.clients() == set()
    await daemon.stop()
    assert await daemon.faulted()


FAILURES = {
    "one that is not there": (("no-such-control",), "", "no-such-control is not there"),
    "one that ends as it starts": (CONTROL, "broken", "the fake is broken"),
    "one whose server finds no GPU": (CONTROL, "blind", "ended as it started[^$]*no CUDA-capable device is detected"),
    "one whose server does not become ready": (CONTROL, "stuck", "has a server that does not become ready"),
}


@pytest.mark.asyncio
@pytest.mark.parametrize(("command", "fault", "reason"), FAILURES.values(), ids=FAILURES)
async def test_a_daemon_that_does_not_start_says_why(
    command: tuple[str, ...], fault: str, reason: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_MPS", fault)
    monkeypatch.setattr("nodeagent.shell.mps._SERVER_S", 2.0)
    daemon = MpsDaemon(command, folder, "GPU-1")
    with pytest.raises(Unavailable, match=reason):
        await daemon.start()
    await daemon.stop()
    assert not os.listdir(folder)


DAEMON = "import os, subprocess, sys; subprocess.Popen(['sleep', '1000'], start_new_session=True); print('up', flush=True); {}"
ENDS = {
    "the end of its input": ("import time; time.sleep(1000)", lambda process: process.stdin.close(), 128 + 15),
    "the end of its input, though SIGTERM is ignored": (
        "import signal, time; signal.signal(15, signal.SIG_IGN); print('deaf', flush=True); time.sleep(1000)",
        lambda process: (process.stdout.readline(), process.stdin.close()),
        128 + 9,
    ),
    "its own end": ("sys.exit(3)", lambda process: None, 3),
}


@pytest.mark.parametrize(("code", "end", "status"), ENDS.values(), ids=ENDS)
def test_what_a_daemon_leaves_behind_ends_with_it(code: str, end: object, status: int) -> None:
    pipe = subprocess.PIPE
    command = [sys.executable, "-m", "nodeagent.shell.tether", sys.executable, "-c", DAEMON.format(code)]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=REPOSITORY) as process:
        assert said(process) == "up"
        family = psutil.Process(process.pid).children(recursive=True)
        end(process)  # type: ignore[operator]
        assert process.wait(60) == status
    assert not any(alive(member) for member in family)


def test_a_daemon_dies_with_what_ties_it() -> None:
    pipe = subprocess.PIPE
    command = [sys.executable, "-m", "nodeagent.shell.tether", sys.executable, "-c", "import time; print('up', flush=True); time.sleep(1000)"]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=REPOSITORY) as process:
        assert said(process) == "up"
        (daemon,) = psutil.Process(process.pid).children()
        process.kill()
        eventually(lambda: not alive(daemon), "the daemon's end")
