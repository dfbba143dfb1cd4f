"""Child processes of the agent: each ends when its standard input does, and is killed when it does not.

Owns none of them: whoever starts one sees to its end.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Mapping, Sequence

from contracts.errors import Unavailable

Process = asyncio.subprocess.Process


async def start(command: Sequence[str], environment: Mapping[str, str] | None = None) -> tuple[Process, socket.socket]:
    """A process whose standard input is a socket, and our end of that; `environment` is added to our own. Unavailable when it cannot be started."""
    ours, theirs = socket.socketpair()
    with theirs:
        try:
            return await asyncio.create_subprocess_exec(*command, stdin=theirs.fileno(), env={**os.environ, **(environment or {})}), ours
        except OSError as error:
            ours.close()
            raise Unavailable(f"{' '.join(command)} cannot be started: {error}") from None


async def end(process: Process, grace_s: float) -> None:
    """Returns when the process has ended, whose input has: by itself within so many seconds, or by SIGKILL."""
    try:
        await asyncio.wait_for(process.wait(), grace_s)
    except TimeoutError:
        kill(process)
        await process.wait()


def kill(process: Process) -> None:
    """SIGKILL, also to one that has ended."""
    with contextlib.suppress(ProcessLookupError):
        process.kill()
