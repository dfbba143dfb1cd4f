"""A predictor process of this machine: started, granted its functions, awaited until it serves them.

Owns one process and its port. Whether and when to start another is its owner's decision (`fronts`, `router`).
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from contracts.errors import Unavailable
from sluice.control import Client
from sluice.ports import authority
from sluice.processes import Child, describe_exit

READY_TIMEOUT_S = 60.0
STOP_GRACE_S = 30.0
_POLL_S = 0.02
_PROBE_TIMEOUT = aiohttp.ClientTimeout(total=5)


@dataclass(frozen=True, slots=True)
class PredictorOptions:
    """How predictors are started: the agent's socket, the address to listen on, and where to send what they print (name, line)."""

    run_dir: Path
    host: str
    on_line: Callable[[str, str], None]
    grpc_port: int | None = None
    command: tuple[str, ...] = (sys.executable, "-m", "predictor")

    def argv(self, port: int) -> list[str]:
        """The command line of a predictor that listens on `port`."""
        agent = str(self.run_dir / "agent.sock")
        grpc = [] if self.grpc_port is None else ["--grpc-port", str(self.grpc_port)]
        return [*self.command, "--agent", agent, "--http-port", str(port), "--host", self.host, *grpc]


class Predictor:
    """One process. `functions` are the keys it may use; none means all."""

    def __init__(self, options: PredictorOptions, port: int, functions: tuple[str, ...] = (), name: str = "predictor") -> None:
        """Starts it; OSError when it cannot be started."""
        self.functions = functions
        self.url = f"http://{authority(options.host)}:{port}"
        self.child = Child(name, options.argv(port), options.on_line)

    async def grant(self, client: Client) -> None:
        """Lets it use its functions; again after the agent was restarted."""
        await client.grant(self.child.pid, self.functions)

    async def wait_ready(self, http: aiohttp.ClientSession, names: Sequence[str], timeout_s: float = READY_TIMEOUT_S) -> None:
        """Returns when it serves every one of `names`; Unavailable when it ended first or took too long."""
        try:
            async with asyncio.timeout(timeout_s):
                for name in names:
                    while not await self._is_ready(http, name):
                        if self.child.returncode is not None:
                            raise Unavailable(f"the predictor {describe_exit(self.child.returncode)} before it served: {last_words(self.child)}")
                        await asyncio.sleep(_POLL_S)
        except TimeoutError:
            raise Unavailable(f"the predictor did not serve {name!r} within {timeout_s:g} s: {last_words(self.child)}") from None

    async def _is_ready(self, http: aiohttp.ClientSession, name: str) -> bool:
        with contextlib.suppress(aiohttp.ClientError, TimeoutError):
            async with http.get(f"{self.url}/v2/models/{name}/ready", timeout=_PROBE_TIMEOUT) as response:
                return response.status == 200
        return False

    async def stop(self) -> None:
        """Lets it answer what it accepted, then ends it."""
        await self.child.stop(STOP_GRACE_S)


def last_words(child: Child) -> str:
    """The last lines that a process printed, for a message."""
    lines = [line for line in child.tail if line.strip()]
    return " | ".join(lines[-3:]) if lines else "it printed nothing"
