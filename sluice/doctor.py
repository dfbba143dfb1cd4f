"""`sluice doctor`: can this machine serve, and if not, what is to be done. Every check tries the thing itself and cleans up after itself.

torch is looked at in a process of its own, because this one runs without it.
"""

from __future__ import annotations

import array
import contextlib
import json
import mmap
import os
import resource
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import msgspec
import psutil
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from contracts.channel import connect
from contracts.errors import SluiceError
from contracts.units import GIB, format_bytes
from sluice.plan import default_device_memory, default_devices, default_host_memory

OK, WARN, FAIL = "ok", "warn", "fail"
_STYLE = {OK: "green", WARN: "yellow", FAIL: "bold red"}
_FEW_FILES = 4096
_TORCH = "import json, torch; print(json.dumps([torch.__version__, torch.version.cuda, torch.cuda.is_available(), torch.get_num_threads()]))"


class Check(msgspec.Struct, frozen=True):
    """One check: `outcome` is ok, warn or fail; `advice` says what to do where it is not ok."""

    name: str
    outcome: str
    found: str
    advice: str = ""


def examine(run_dir: Path) -> list[Check]:
    """All checks, in the order in which a start would meet them."""
    checks: list[Callable[[], Check]] = [
        _python,
        _packages,
        _torch,
        _processors,
        _memory,
        _shared_memory,
        _open_files,
        _descriptors,
        lambda: _run_dir(run_dir),
        lambda: _sockets(run_dir),
        _devices,
    ]
    return [check() for check in checks]


def render(checks: list[Check]) -> RenderableType:
    """A line for each check."""
    table = Table(box=None, pad_edge=False, show_header=False)
    for check in checks:
        text = Text(check.found)
        if check.advice:
            text.append(f"\n-> {check.advice}", style=_STYLE[check.outcome])
        table.add_row(Text(check.outcome, style=_STYLE[check.outcome]), check.name, text)
    return table


def _python() -> Check:
    found = f"{sys.version.split()[0]} at {sys.executable}"
    if sys.platform != "linux":
        return Check("python", FAIL, f"{found} on {sys.platform}", "run it on Linux: memfd, SCM_RIGHTS and pidfd are needed")
    return Check("python", OK, found)


def _packages() -> Check:
    wanted = ("aiohttp", "blake3", "msgspec", "uvicorn", "uvloop")
    found, missing = [], []
    for name in wanted:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        return Check("packages", FAIL, f"missing: {', '.join(missing)}", "pip install 'sluice[predictor,worker]'")
    return Check("packages", OK, ", ".join(found))


def _torch() -> Check:
    try:
        done = subprocess.run([sys.executable, "-c", _TORCH], capture_output=True, text=True, timeout=120, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Check("torch", FAIL, f"did not import: {error}", "pip install 'sluice[worker]'")
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        return Check("torch", FAIL, f"does not import: {last[0]}", "pip install 'sluice[worker]'")
    version, cuda, available, threads = json.loads(done.stdout.splitlines()[-1])
    return Check("torch", OK, f"{version}, CUDA {cuda or 'not built in'}{' (usable)' if available else ''}, {threads} threads")


def _processors() -> Check:
    count = len(os.sched_getaffinity(0))
    if count < 2:
        return Check("processors", WARN, f"{count} usable", "latencies will be high: lanes, predictor and agent share one core")
    return Check("processors", OK, f"{count} usable")


def _memory() -> Check:
    memory = psutil.virtual_memory()
    found = f"{format_bytes(memory.available)} free of {format_bytes(memory.total)}"
    if memory.available < 2 * GIB:
        return Check("memory", WARN, found, "keep --device-memory and --host-memory small")
    return Check("memory", OK, found)


def _shared_memory() -> Check:
    try:
        stat = os.statvfs("/dev/shm")
    except OSError as error:
        return Check("/dev/shm", FAIL, f"cannot be used: {error.strerror}", "mount a tmpfs at /dev/shm")
    free, size = stat.f_bavail * stat.f_frsize, stat.f_blocks * stat.f_frsize
    found = f"{format_bytes(free)} free of {format_bytes(size)}"
    if not os.access("/dev/shm", os.W_OK | os.X_OK):
        return Check("/dev/shm", FAIL, f"{found}, not writable", "make it writable: host weights lie there")
    if free < GIB:
        return Check("/dev/shm", WARN, found, "enlarge it (containers: --shm-size=8g, or an emptyDir of medium Memory): all weights must fit")
    return Check("/dev/shm", OK, found)


def _open_files() -> Check:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    found = f"{soft} (hard limit {hard})"
    if soft < _FEW_FILES:
        return Check("open files", WARN, found, f"for hundreds of functions: ulimit -n {max(_FEW_FILES, min(hard, 65536))}")
    return Check("open files", OK, found)


def _descriptors() -> Check:
    """A memfd passed through a socket, mapped at the other side: the way of every tensor."""
    try:
        with contextlib.ExitStack() as stack:
            fd = os.memfd_create("sluice-doctor", os.MFD_CLOEXEC)
            stack.callback(os.close, fd)
            os.ftruncate(fd, mmap.PAGESIZE)
            left, right = socket.socketpair()
            stack.callback(left.close)
            stack.callback(right.close)
            socket.send_fds(left, [b"x"], [fd])
            _, ancillary, _, _ = right.recvmsg(1, socket.CMSG_SPACE(4), socket.MSG_CMSG_CLOEXEC)
            received = array.array("i", ancillary[0][2])[0]
            stack.callback(os.close, received)
            with mmap.mmap(received, mmap.PAGESIZE) as theirs:
                os.pwrite(fd, b"sluice", 0)
                works = theirs[:6] == b"sluice"
    except (OSError, IndexError) as error:
        return Check(
            "memory by descriptor", FAIL, f"memfd over SCM_RIGHTS does not work: {error}", "allow memfd_create and sendmsg (seccomp profile)"
        )
    if not works:
        return Check("memory by descriptor", FAIL, "a mapped memfd does not show what was written", "use a kernel with coherent shared memory")
    return Check("memory by descriptor", OK, "memfd over SCM_RIGHTS works")


def _run_dir(run_dir: Path) -> Check:
    folder = run_dir
    while not folder.exists():
        folder = folder.parent
    try:
        with tempfile.TemporaryDirectory(prefix=".sluice-doctor-", dir=folder):
            pass
    except OSError as error:
        return Check("run directory", FAIL, f"{run_dir}: {error.strerror}", "name a writable one with --run-dir")
    if run_dir.exists() and (run_dir.stat().st_uid != os.getuid() or run_dir.stat().st_mode & 0o077):
        return Check("run directory", FAIL, f"{run_dir} is not private to you", f"chmod 700 {run_dir}, or name another with --run-dir")
    return Check("run directory", OK, str(run_dir))


def _sockets(run_dir: Path) -> Check:
    path = run_dir / "control.sock"
    if len(os.fsencode(path)) > 107:
        return Check("sockets", FAIL, f"{path} is too long for a Unix socket", "name a shorter folder with --run-dir")
    try:
        connect(str(path)).close()
    except OSError:
        return Check("sockets", OK, "no node runs there now")
    return Check("sockets", WARN, f"a node runs at {run_dir} already", "stop it before the next `sluice up`, or name another --run-dir")


def _devices() -> Check:
    try:
        devices = default_devices()
    except SluiceError as error:
        return Check("devices", FAIL, error.message, "check the driver: nvidia-smi")
    memory, host = default_device_memory(devices), format_bytes(default_host_memory())
    each = format_bytes(memory) if memory else "what lanes leave"
    return Check("devices", OK, f"`sluice up` would use {', '.join(devices)} with {each} of device memory and {host} for host weights")
