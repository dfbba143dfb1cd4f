"""How the node is reached: one predictor for all functions (here), or one per function behind the router (`sluice.router`).

Owns the one predictor's life: a process that dies is started again, after a pause that grows while it keeps dying.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import aiohttp

from contracts.errors import SluiceError
from sluice.control import Client
from sluice.predictors import Predictor, PredictorOptions
from sluice.processes import describe_exit

_FIRST_PAUSE_S = 0.2
_LONGEST_PAUSE_S = 10.0
_STEADY_S = 30.0


class Front(Protocol):
    """What the supervisor needs of either way to reach the node."""

    async def start(self, client: Client) -> None:
        """Begins to listen."""

    async def wait_ready(self, names: Sequence[str]) -> None:
        """Returns when these functions can be called."""

    async def agent_changed(self, client: Client) -> None:
        """A new agent runs: grants everything again."""

    async def stop(self) -> None:
        """Answers what was accepted, and ends every process."""

    def kill(self) -> None:
        """Ends every process at once."""


class Pauses:
    """How long to wait before starting again what died: longer each time, short again after a steady life."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._steps = self._sequence()
        self._started = clock()

    def started(self) -> None:
        """It is tried again now."""
        self._started = self._clock()

    def next(self) -> float:
        """Seconds to wait now that it died."""
        if self._clock() - self._started > _STEADY_S:
            self._steps = self._sequence()
        return next(self._steps)

    @staticmethod
    def _sequence() -> Iterator[float]:
        pause = _FIRST_PAUSE_S
        while True:
            yield pause
            pause = min(2 * pause, _LONGEST_PAUSE_S)


class SharedFront:
    """One predictor on the public port fronts every function."""

    def __init__(self, options: PredictorOptions, port: int, say: Callable[[str], None]) -> None:
        self._options = options
        self._port = port
        self._say = say
        self._predictor: Predictor | None = None
        self._client: Client | None = None
        self._keeper: asyncio.Task[None] | None = None

    async def start(self, client: Client) -> None:
        """Starts the predictor and grants it all functions, those to come included."""
        self._client = client
        self._predictor = Predictor(self._options, self._port)
        await self._predictor.grant(client)

    async def wait_ready(self, names: Sequence[str]) -> None:
        """Returns when every one of `names` is served, and from then on keeps a predictor running."""
        assert self._predictor is not None
        async with aiohttp.ClientSession() as http:
            await self._predictor.wait_ready(http, names)
        self._keeper = asyncio.create_task(self._keep())

    async def agent_changed(self, client: Client) -> None:
        """Grants the predictor its functions at the new agent, which it joins by itself."""
        self._client = client
        if self._predictor is not None:
            await self._predictor.grant(client)

    async def stop(self) -> None:
        """Drains the predictor and ends it."""
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
        if self._predictor is not None:
            await self._predictor.stop()

    def kill(self) -> None:
        """Ends the predictor at once."""
        if self._predictor is not None:
            self._predictor.child.kill()

    async def _keep(self) -> None:
        pauses = Pauses()
        while True:
            assert self._predictor is not None
            code = await self._predictor.child.wait()
            await self._predictor.child.bury()
            pause = pauses.next()
            self._say(f"the predictor {describe_exit(code)}; a new one starts in {pause:g} s")
            await asyncio.sleep(pause)
            try:
                pauses.started()
                self._predictor = Predictor(self._options, self._port)
                if self._client is not None:
                    await self._predictor.grant(self._client)
            except (OSError, SluiceError) as error:
                # An agent that is away grants it when it is back (agent_changed); a process that cannot start is tried again by the next round.
                self._say(f"the new predictor waits: {error}")
