"""`python -m nodeagent.shell.tether COMMAND...`: runs a daemon that must not outlive whoever holds the other end of standard input.

The MPS control daemon knows no such tie, and what it starts is no child of the agent. This process takes in all that the daemon leaves behind, and
ends it with the daemon. The end of standard input means SIGTERM, and SIGKILL after a few seconds. It ends with the daemon's own exit code.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_GRACE_S = 3.0
# Looked up here: between fork and exec nothing may be imported or loaded.
_prctl = ctypes.CDLL(None).prctl


def run(command: Sequence[str]) -> int:
    """Runs a command to its end, or to the end of standard input; returns its exit code when nothing of it is left."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=_before_exec)
    pidfd = os.pidfd_open(child.pid)
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    poll.register(0, select.POLLIN | select.POLLHUP)
    while child.poll() is None and not _input_ended(poll.poll(), pidfd):
        pass
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
    _end_orphans()
    return child.returncode


def _before_exec() -> None:
    """In the child: it dies with this process, and signals are its own again."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


def _input_ended(events: list[tuple[int, int]], pidfd: int) -> bool:
    return any(fd != pidfd and not os.read(fd, 4096) for fd, _ in events)


def _end_orphans() -> None:
    """Ends what the daemon left behind: it has become this process's own children."""
    deadline = time.monotonic() + _GRACE_S
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    while pids := [int(pid) for pid in children.read_text("ascii").split()]:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)
        if time.monotonic() > deadline:
            return


if __name__ == "__main__":
    code = run(sys.argv[1:])
    sys.exit(code if code >= 0 else 128 - code)
