"""The loader: a process of its own that reads models into the host store, so that the agent needs no torch and survives what a model file does.

Owns the process: started on demand, ended when idle, replaced when it dies. It runs near the devices, so that what it writes lies in memory near
them. One JSON line asks, one answers; one model at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Collection, Sequence

import msgspec

from contracts.errors import Unavailable, from_wire
from contracts.functions import ModelRef
from nodeagent.shell import children

_log = logging.getLogger(__name__)
_LOAD_S = 900.0
_IDLE_S = 10.0
_EXIT_S = 2.0
_LINE_BYTES = 1 << 20


class _Ask(msgspec.Struct):
    id: int
    format: str
    source: str
    limit_bytes: int


class _Answer(msgspec.Struct):
    id: int
    digest: str = ""
    error: tuple[str, str] | None = None


class Loader:
    """A client of one loader process at a time."""

    def __init__(self, command: Sequence[str], cpus: Collection[int] = ()) -> None:
        """`cpus`: those that it may use; empty: any."""
        self._command = command
        self._cpus = cpus
        self._process: children.Process | None = None
        self._busy = asyncio.Lock()
        self._asked = 0
        self._idle: asyncio.TimerHandle | None = None
        self._ending: set[asyncio.Task[None]] = set()

    async def load(self, ref: ModelRef, limit_bytes: int) -> str:
        """Reads a model into the store, `limit_bytes` of it at most; returns the digest. The loader's own error, or Unavailable when it died."""
        async with self._busy:
            if self._idle is not None:
                self._idle.cancel()
            try:
                async with asyncio.timeout(_LOAD_S):
                    return await self._ask(ref, limit_bytes)
            except TimeoutError:
                await self._end(kill=True)
                raise Unavailable(f"{ref.source} was not loaded within {_LOAD_S:.0f} s") from None
            except asyncio.CancelledError:
                await self._end(kill=True)
                raise
            finally:
                self._idle = asyncio.get_running_loop().call_later(_IDLE_S, self._end_soon)

    async def close(self) -> None:
        """Ends the process."""
        if self._idle is not None:
            self._idle.cancel()
        await self._end(kill=True)
        if self._ending:
            await asyncio.wait(self._ending)

    async def _ask(self, ref: ModelRef, limit_bytes: int) -> str:
        process = await self._start()
        assert process.stdin is not None and process.stdout is not None
        self._asked += 1
        ask = _Ask(self._asked, ref.format, ref.source, limit_bytes)
        try:
            process.stdin.write(msgspec.json.encode(ask) + b"\n")
            await process.stdin.drain()
            line = await process.stdout.readline()
            answer = msgspec.json.decode(line, type=_Answer) if line else None
        except (OSError, ValueError) as error:
            _log.warning("the loader broke off: %s", error)
            answer = None
        if answer is None or answer.id != ask.id:
            await self._end(kill=True)
            raise Unavailable(f"the loader died while it read {ref.source} (exit {process.returncode})")
        if answer.error is not None:
            raise from_wire(*answer.error)
        return answer.digest

    async def _start(self) -> children.Process:
        if self._process is None or self._process.returncode is not None:
            pipe = asyncio.subprocess.PIPE
            try:
                self._process = await asyncio.create_subprocess_exec(*self._command, stdin=pipe, stdout=pipe, limit=_LINE_BYTES)
            except OSError as error:
                raise Unavailable(f"the loader cannot be started: {error}") from None
            if self._cpus:
                with contextlib.suppress(OSError):
                    os.sched_setaffinity(self._process.pid, self._cpus)
        return self._process

    def _end_soon(self) -> None:
        ending = asyncio.get_running_loop().create_task(self._end(kill=False))
        self._ending.add(ending)
        ending.add_done_callback(self._ending.discard)

    async def _end(self, *, kill: bool) -> None:
        """Ends the process, by the end of its input or by SIGKILL, and waits for it."""
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        process.stdin.close()
        await children.end(process, 0.0 if kill else _EXIT_S)
