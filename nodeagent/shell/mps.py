"""A private MPS daemon for one GPU: started, watched and ended by the agent, in a pipe directory that nobody else uses.

Owns the daemon's processes and its folder. It never touches the compute mode, clocks or MIG settings of a GPU, and never another daemon. One daemon
for each GPU, so that what breaks one leaves the others. Speaks the control commands of MPS v2, which later drivers keep. Source: NVIDIA MPS
documentation, "Legacy MPS v2 Interface" and "Troubleshooting".
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import BinaryIO

from contracts.errors import Unavailable

_log = logging.getLogger(__name__)
PREFIX = "mps-"
PATH_BYTES = len(f"/{PREFIX}xxxxxxxx/nvidia-cuda-mps-control.pid")
"""What the longest of its names adds to the run dir's path; the sockets among them are bound by the length of a Unix socket's path."""
_PLACES = "/usr/bin:/usr/sbin:/usr/local/nvidia/bin:/opt/bin"
"""Where daemon and server lie when the path does not say: containers get them mounted. The daemon looks for its server on its own path."""
_UP_S = 20.0
_SERVER_S = 60.0
_COMMAND_S = 10.0
_QUIT_S = 5.0
_POLL_S = 0.05
_LOG = "control.log"
_LOG_LINES = 8
_EXITED = "exited with status"
_CHATTER = ("Accepting connection", "NEW UI", "Cmd:", "UI closed")


class MpsDaemon:
    """One daemon and its server. `died` is set when either has gone; `start` and `stop` are called once each."""

    def __init__(self, command: Sequence[str], run_dir: Path, uuid: str) -> None:
        self.died = asyncio.Event()
        self._command = tuple(command)
        self._folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=run_dir))
        self.environment = {"CUDA_VISIBLE_DEVICES": uuid, "CUDA_MPS_PIPE_DIRECTORY": str(self._folder), "CUDA_MPS_LOG_DIRECTORY": str(self._folder)}
        self._loop = asyncio.get_running_loop()
        self._tether: asyncio.subprocess.Process | None = None
        self._watch: asyncio.Task[None] | None = None
        self._server = 0
        self._server_fd = -1

    async def start(self) -> None:
        """Returns when a server is ready for clients. Unavailable, with the end of its log, when that does not happen; call `stop` then too."""
        program = shutil.which(self._command[0]) or shutil.which(self._command[0], path=_PLACES)
        if program is None:
            raise Unavailable(f"{self._command[0]} is not there")
        self._command = (program, *self._command[1:])
        tether = (sys.executable, "-m", "nodeagent.shell.tether", *self._command, "-f")
        pipe = asyncio.subprocess.PIPE
        with self._open_log() as log:
            self._tether = await asyncio.create_subprocess_exec(*tether, stdin=pipe, stdout=log, stderr=log, env=self._whole_environment())
        self._watch = self._loop.create_task(self._watch_tether(self._tether))
        try:
            await self._until(self._answers, _UP_S, "does not answer")
            await self._control(f"start_server -uid {os.geteuid()}")
            await self._until(self._has_server, _SERVER_S, "starts no server")
            await self._until(self._server_ready, _SERVER_S, "has a server that does not become ready")
            self._watch_server()
        except Unavailable as error:
            raise Unavailable(f"{error.message}{self._last_words()}") from None

    async def faulted(self) -> bool:
        """Whether a client's fatal error has taken all clients with it, or the daemon no longer knows of its server."""
        try:
            return _is_lost(await self._control(f"get_server_status {self._server}"))
        except Unavailable:
            return True

    async def clients(self) -> set[int]:
        """The processes that the server knows as its clients."""
        return _numbers(await self._control(f"get_client_list {self._server}"))

    async def terminate_client(self, pid: int) -> None:
        """Ends a client's work on the GPU, so that its process may be killed: killing a busy client leaves the server in an undefined state."""
        try:
            await self._control(f"terminate_client {self._server} {pid}")
        except Unavailable as error:
            _log.warning("client %d could not be terminated before it is killed: %s", pid, error.message)

    async def stop(self) -> None:
        """Ends the daemon and its server, and removes their folder. Its clients should have gone."""
        if self._tether is not None and self._watch is not None:
            if not self.died.is_set():
                with contextlib.suppress(Unavailable):
                    await self._control("quit")
                    await asyncio.wait_for(asyncio.shield(self._watch), _QUIT_S)
                    self.died.set()
            assert self._tether.stdin is not None
            self._tether.stdin.close()
            await self._watch
        if self._server_fd >= 0:
            self._loop.remove_reader(self._server_fd)
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._server_fd, signal.SIGKILL)
            os.close(self._server_fd)
            self._server_fd = -1
        shutil.rmtree(self._folder, ignore_errors=True)

    def _whole_environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("CUDA_MPS_")}
        return kept | self.environment | {"CUDA_MPS_PROTOCOL_VERSION": "2", "PATH": f"{kept.get('PATH', os.defpath)}:{_PLACES}"}

    async def _control(self, command: str) -> str:
        """What the daemon answers to a command; Unavailable when it does not."""
        pipe = asyncio.subprocess.PIPE
        try:
            process = await asyncio.create_subprocess_exec(
                *self._command, stdin=pipe, stdout=pipe, stderr=asyncio.subprocess.STDOUT, env=self._whole_environment()
            )
        except OSError as error:
            raise Unavailable(f"{self._command[0]} cannot be started: {error}") from None
        try:
            async with asyncio.timeout(_COMMAND_S):
                out, _ = await process.communicate(f"{command}\n".encode())
        except TimeoutError:
            raise Unavailable(f"the MPS daemon did not answer {command!r} within {_COMMAND_S:.0f} s") from None
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
        text = out.decode(errors="replace").strip()
        if process.returncode or text.startswith("Cannot find MPS control daemon"):
            raise Unavailable(f"the MPS daemon does not answer {command!r}: {text or f'exit {process.returncode}'}")
        return text

    async def _until(self, probe: Callable[[], Awaitable[bool]], seconds: float, what: str) -> None:
        deadline = time.monotonic() + seconds
        while not await probe():
            if self.died.is_set():
                raise Unavailable("the MPS daemon ended as it started")
            if time.monotonic() > deadline:
                raise Unavailable(f"the MPS daemon {what} after {seconds:.0f} s")
            await asyncio.sleep(_POLL_S)

    async def _answers(self) -> bool:
        with contextlib.suppress(Unavailable):
            await self._control("get_server_list")
            return True
        return False

    async def _has_server(self) -> bool:
        self._server = max(_numbers(await self._control("get_server_list")), default=0)
        if not self._server and any(_EXITED in line for line in self._log_lines()):
            raise Unavailable("the MPS server ended as it started")
        return self._server > 0

    async def _server_ready(self) -> bool:
        """A driver whose daemon does not know the question has no state to wait for."""
        status = await self._control(f"get_server_status {self._server}")
        if _is_lost(status):
            raise Unavailable(f"the MPS server ended as it started ({status})")
        return "INITIALIZING" not in status.upper()

    def _watch_server(self) -> None:
        try:
            self._server_fd = os.pidfd_open(self._server)
        except ProcessLookupError:
            raise Unavailable("the MPS server ended as it started") from None
        self._loop.add_reader(self._server_fd, self._on_server_exit)

    async def _watch_tether(self, process: asyncio.subprocess.Process) -> None:
        await process.wait()
        self.died.set()

    def _on_server_exit(self) -> None:
        self._loop.remove_reader(self._server_fd)
        self.died.set()

    def _last_words(self) -> str:
        """The end of its log, which says why it failed, without what it says of each command."""
        return "".join(f"\n{line}" for line in [line for line in self._log_lines() if not any(word in line for word in _CHATTER)][-_LOG_LINES:])

    def _open_log(self) -> BinaryIO:
        """In the foreground the daemon and its server log to their standard output and to no file."""
        return open(self._folder / _LOG, "wb")

    def _log_lines(self) -> list[str]:
        try:
            return (self._folder / _LOG).read_text(errors="replace").splitlines()
        except OSError:
            return []


def _is_lost(status: str) -> bool:
    """A server that has failed goes by itself, and then "Server 123 not found" is all that is said of it."""
    return "FAULT" in status.upper() or "NOT FOUND" in status.upper()


def _numbers(text: str) -> set[int]:
    """Process ids, one a line; what else is said holds a number, too."""
    return {int(line) for line in text.splitlines() if line.strip().isdecimal()}
