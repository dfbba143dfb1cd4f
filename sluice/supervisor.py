"""The local supervisor: starts the node agent and its predictors, starts again what dies, and stops all of it in order.

Owns the node's processes and its run directory. It makes no scheduling decision, and keeps nothing that an agent needs except what the user asked
for: the functions, and the shares that they were last given.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from contracts.errors import InvalidValue, NotPermitted, Refused, SluiceError, Unavailable
from contracts.functions import Function
from sluice.control import Client
from sluice.fronts import Front, Pauses, SharedFront
from sluice.plan import Plan
from sluice.ports import check_port
from sluice.predictors import PredictorOptions, last_words
from sluice.processes import Child, describe_exit
from sluice.router import Router
from sluice.rundir import RunDir
from sluice.status import share_text

_AGENT_START_S = 30.0
_GPU_START_S = 300.0
_AGENT_GRACE_S = 20.0
_POLL_S = 0.02


@dataclass(frozen=True, slots=True)
class Loading:
    """A function finished loading: `done` of `total`, `error` empty when it serves."""

    key: str
    done: int
    total: int
    error: str = ""


@dataclass(slots=True)
class Outcome:
    """Which functions serve, and why the others do not."""

    serving: list[Function] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


class Supervisor:
    """One node's processes. `start`, then `stop` (always, also when `start` raised); `kill` ends all at once.

    `say(text)` gets what a person should know, `on_line(process, line)` what the processes print.
    """

    def __init__(self, plan: Plan, run_dir: RunDir, say: Callable[[str], None], on_line: Callable[[str, str], None]) -> None:
        self._plan = plan
        self._run_dir = run_dir
        self._say = say
        self._on_line = on_line
        self._functions = {function.key: function for function in plan.functions}
        self._agent: Child | None = None
        self._client: Client | None = None
        self._front: Front | None = None
        self._keeper: asyncio.Task[None] | None = None

    @property
    def client(self) -> Client:
        """The connection to the agent that runs now; Unavailable between two agents."""
        if self._client is None or self._client.closed:
            raise Unavailable("the node agent is not running")
        return self._client

    async def start(self, on_loading: Callable[[Loading], None]) -> Outcome:
        """Starts everything; returns when each function serves or has failed. SluiceError when the node as a whole cannot serve what was asked."""
        check_port(self._plan.host, self._plan.port)
        client = await self._start_agent()
        self._front = self._make_front()
        await self._front.start(client)
        outcome = await self._declare_all(client, on_loading)
        if not outcome.serving:
            raise SluiceError("no function can be served:\n" + "\n".join(f"  {key}: {reason}" for key, reason in outcome.failed.items()))
        await self._front.wait_ready([function.name for function in outcome.serving])
        self._keeper = asyncio.create_task(self._keep_agent())
        return outcome

    async def stop(self) -> None:
        """Answers what was accepted, ends every process, removes the run directory and the weight store."""
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
        try:
            if self._front is not None:
                await self._front.stop()
        finally:
            if self._client is not None:
                self._client.close()
            if self._agent is not None:
                await self._agent.stop(_AGENT_GRACE_S)
            self._run_dir.remove()

    def kill(self) -> None:
        """Ends every process at once; `stop`, under way or still to come, then has little to wait for."""
        if self._front is not None:
            self._front.kill()
        if self._agent is not None:
            self._agent.kill()

    def _make_front(self) -> Front:
        plan = self._plan
        if plan.isolate:
            options = PredictorOptions(plan.run_dir, "127.0.0.1", self._on_line)
            return Router(options, plan.host, plan.port, plan.functions, plan.idle_s, self._say)
        return SharedFront(PredictorOptions(plan.run_dir, plan.host, self._on_line, plan.grpc_port), plan.port, self._say)

    async def _start_agent(self) -> Client:
        self._unlink_sockets()
        start_s = _GPU_START_S if self._plan.gpus else _AGENT_START_S
        agent = self._agent = Child("agent", [sys.executable, "-m", "nodeagent", *self._plan.agent_arguments()], self._on_line)
        try:
            async with asyncio.timeout(start_s):
                while True:
                    with contextlib.suppress(Unavailable):
                        self._client = Client(self._plan.run_dir)
                        await self._client.watch(self._remember)
                        return self._client
                    if agent.returncode is not None:
                        await agent.bury()
                        raise Unavailable(f"the node agent {describe_exit(agent.returncode)} as it started: {last_words(agent)}")
                    await asyncio.sleep(_POLL_S)
        except TimeoutError:
            raise Unavailable(f"the node agent did not open its control socket within {start_s:g} s: {last_words(agent)}") from None

    def _unlink_sockets(self) -> None:
        """Nobody is to connect to what a dead agent left: a child of it that has not yet run its own program may still hold the listening end."""
        for name in ("agent.sock", "control.sock"):
            (self._plan.run_dir / name).unlink(missing_ok=True)

    async def _declare_all(self, client: Client, on_loading: Callable[[Loading], None]) -> Outcome:
        """Declares every function. What the node refuses (shares, host memory) is an error of the whole; what cannot be loaded fails alone."""
        outcome = Outcome()

        async def declare(function: Function) -> None:
            error = ""
            try:
                await client.declare(function)
                outcome.serving.append(function)
            except (Refused, NotPermitted) as refusal:
                raise SluiceError(f"{function.key} cannot be served on this node: {refusal.message}") from None
            except (InvalidValue, SluiceError) as failure:
                if client.closed:
                    raise
                error = outcome.failed[function.key] = failure.message
            on_loading(Loading(function.key, len(outcome.serving) + len(outcome.failed), len(self._functions), error))

        try:
            async with asyncio.TaskGroup() as group:
                for function in self._functions.values():
                    group.create_task(declare(function))
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return outcome

    async def _keep_agent(self) -> None:
        pauses = Pauses()
        while True:
            assert self._agent is not None
            code = await self._agent.wait()
            self._unlink_sockets()
            if self._client is not None:
                await self._client.wait_ended()
            await self._agent.bury()
            pause = pauses.next()
            self._say(f"the node agent {describe_exit(code)}; a new one starts in {pause:g} s")
            await asyncio.sleep(pause)
            try:
                pauses.started()
                client = await self._start_agent()
                assert self._front is not None
                await self._front.agent_changed(client)
                outcome = await self._declare_all(client, lambda _: None)
            except (OSError, SluiceError) as error:
                self._say(f"the new node agent cannot serve yet: {error}")
                if self._agent.returncode is None:
                    await self._agent.stop(_AGENT_GRACE_S)
                continue
            self._say(f"the node agent runs again with {len(outcome.serving)} of {len(self._functions)} functions")

    def _remember(self, function: Function) -> None:
        """A share changed by `sluice share`: a new agent must get it too."""
        known = self._functions.get(function.key)
        if known is not None and known.share != function.share:
            self._functions[function.key] = msgspec.structs.replace(known, share=function.share)
            self._say(f"{function.key} has a new share: {share_text(function.share)}")
