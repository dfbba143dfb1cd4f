"""Child processes of the supervisor: started so that they cannot outlive it, their output kept, their end awaited.

A child gets a session of its own (Ctrl-C in the terminal reaches only the supervisor, which then stops the children in order) and SIGTERM from the
kernel when the supervisor dies, however it dies. Its standard output and error come back line by line.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import subprocess
from collections import deque
from collections.abc import Callable, Sequence

import psutil

_PR_SET_PDEATHSIG = 1
_TAIL_LINES = 40
_LINE_BYTES = 4096
_BURIAL_S = 5.0
# Looked up here: between fork and exec nothing may be imported or loaded.
_prctl = ctypes.CDLL(None).prctl


class Child:
    """One running process. Start it from the main thread: the kernel ties the death signal to the thread that forked."""

    def __init__(self, name: str, argv: Sequence[str], on_line: Callable[[str, str], None]) -> None:
        """Starts `argv`; `on_line(name, line)` gets what it prints. OSError when it cannot be started. Needs a running loop."""
        self.name = name
        self.tail: deque[str] = deque(maxlen=_TAIL_LINES)
        self._on_line = on_line
        self._partial = b""
        self._loop = asyncio.get_running_loop()
        self._exited = asyncio.Event()
        self._silent = asyncio.Event()
        parent = os.getpid()

        def die_with_parent() -> None:
            _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != parent:
                os._exit(1)

        self._output, write_end = os.pipe()
        os.set_blocking(self._output, False)
        try:
            self._popen = subprocess.Popen(
                list(argv), stdin=subprocess.DEVNULL, stdout=write_end, stderr=write_end, start_new_session=True, preexec_fn=die_with_parent
            )
        except OSError:
            os.close(self._output)
            raise
        finally:
            os.close(write_end)
        self._pidfd = os.pidfd_open(self.pid)
        self._loop.add_reader(self._output, self._on_output)
        self._loop.add_reader(self._pidfd, self._on_exit)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._popen.pid

    @property
    def returncode(self) -> int | None:
        """As subprocess gives it: None while it runs, minus the signal's number when one ended it."""
        return self._popen.returncode

    async def wait(self) -> int:
        """Returns its return code when it has ended."""
        await self._exited.wait()
        code: int = self._popen.returncode
        return code

    def signal(self, number: int) -> None:
        """Sends a signal, if it still runs."""
        if self._popen.returncode is None:
            self._popen.send_signal(number)

    def kill(self) -> None:
        """Ends it at once."""
        self.signal(signal.SIGKILL)

    async def stop(self, grace_s: float) -> None:
        """SIGTERM, SIGKILL after `grace_s`; returns when it and all its descendants have gone."""
        family = self._family()
        self.signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(grace_s):
                await self._exited.wait()
        except TimeoutError:
            self._on_line(self.name, f"did not end within {grace_s:g} s of SIGTERM: killed")
            self.kill()
            await self._exited.wait()
        await self._bury(family)

    async def bury(self) -> None:
        """After its end: waits for what it left behind, and kills what stays."""
        await self._bury(self._family())

    async def _bury(self, family: list[psutil.Process]) -> None:
        # Descendants write to the same pipe, so its end is the news that the last of them has gone.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_BURIAL_S):
                await self._silent.wait()
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                    self._on_line(self.name, f"left process {process.pid} behind: killed")
                    process.kill()
        self._end_output()

    def _family(self) -> list[psutil.Process]:
        """Its descendants now. Orphans are found by their session, which they inherited."""
        found = []
        with contextlib.suppress(psutil.NoSuchProcess):
            found = psutil.Process(self.pid).children(recursive=True)
        for pid in psutil.pids():
            with contextlib.suppress(OSError, psutil.NoSuchProcess):
                if pid != self.pid and os.getsid(pid) == self.pid:
                    found.append(psutil.Process(pid))
        return found

    def _on_exit(self) -> None:
        if self._popen.poll() is not None:
            self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._exited.set()

    def _on_output(self) -> None:
        try:
            data = os.read(self._output, 1 << 16)
        except (BlockingIOError, InterruptedError):
            return
        *lines, self._partial = (self._partial + data).split(b"\n")
        if len(self._partial) > _LINE_BYTES or (not data and self._partial):
            lines.append(self._partial)
            self._partial = b""
        for line in lines:
            text = line[:_LINE_BYTES].decode(errors="replace").rstrip()
            if text:
                self.tail.append(text)
                self._on_line(self.name, text)
        if not data:
            self._end_output()

    def _end_output(self) -> None:
        if not self._silent.is_set():
            self._silent.set()
            self._loop.remove_reader(self._output)
            os.close(self._output)


def describe_exit(code: int) -> str:
    """A return code in words."""
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"was ended by signal {-code}"
