"""`sluice up`: one node in the foreground, from the first progress bar to the last process's end.

Owns signals and what is shown. The first SIGINT or SIGTERM stops the node in order, the second at once. Progress and logs go to standard error;
standard output carries the table and the reports, or JSON lines alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from contracts.errors import SluiceError
from contracts.functions import Function
from contracts.status import NodeStatus
from contracts.units import format_bytes
from nodeagent.shell.hoststore import store_folder
from sluice import examples, status
from sluice.demo import run as demo_run
from sluice.demo.report import render
from sluice.plan import Plan
from sluice.rundir import RunDir
from sluice.supervisor import Loading, Outcome, Supervisor

_INTERRUPTED = 130


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """How long to load the node, and the seed of arrivals and inputs."""

    seconds: float
    seed: int


class Screen:
    """Where a person reads: results on standard output, the rest on standard error."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        self.results = status.console()
        self.notes = status.console(stderr=True)

    def say(self, text: str) -> None:
        """A line about the node."""
        self.notes.print(f"[bold]sluice[/] │ {escape(text)}", highlight=False, soft_wrap=True)

    def on_line(self, process: str, line: str) -> None:
        """A line that a process printed."""
        self.notes.print(f"[dim]{escape(process)} │ {escape(line)}[/]", highlight=False, soft_wrap=True)

    def write(self, value: object) -> None:
        """A JSON line."""
        self.results.file.write(msgspec.json.encode(value).decode() + "\n")
        self.results.file.flush()

    def progress(self, *, transient: bool = True) -> Progress:
        """A progress bar among the notes."""
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        return Progress(*columns, console=self.notes, transient=transient, disable=self.as_json)


async def run(plan: Plan, demo: DemoOptions | None, *, as_json: bool) -> int:
    """Serves until a signal, or for the demo's time; returns the exit code. SluiceError when the node cannot serve what was asked."""
    screen = Screen(as_json)
    run_dir = RunDir(plan.run_dir, store_folder(plan.run_dir))
    supervisor = Supervisor(plan, run_dir, screen.say, screen.on_line)
    work = asyncio.create_task(_serve(plan, demo, supervisor, screen))
    signals = 0

    def on_signal() -> None:
        nonlocal signals
        signals += 1
        if signals == 1:
            screen.say("stopping: what was accepted is answered first (once more to stop at once)")
            work.cancel()
        else:
            supervisor.kill()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal)
    try:
        return await work
    except asyncio.CancelledError:
        return _INTERRUPTED
    finally:
        await supervisor.stop()


async def _serve(plan: Plan, demo: DemoOptions | None, supervisor: Supervisor, screen: Screen) -> int:
    outcome = await _start(plan, supervisor, screen)
    if outcome.failed and demo is not None:
        raise SluiceError(f"{len(outcome.failed)} of {len(plan.functions)} functions cannot be served, so there is no demo")
    if demo is not None:
        report = await demo_run.run(plan, outcome.serving, demo.seconds, demo.seed, lambda: supervisor.client, screen.progress(transient=False))
        if screen.as_json:
            screen.write(report)
        else:
            screen.results.print(render(report))
        return 0 if report.passed else 1
    await _introduce(plan, outcome, supervisor, screen)
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.Event().wait()
    return 0


async def _start(plan: Plan, supervisor: Supervisor, screen: Screen) -> Outcome:
    with screen.progress() as progress:
        task = progress.add_task(f"loading weights of {len(plan.functions)} functions", total=len(plan.functions))

        def on_loading(loading: Loading) -> None:
            progress.update(task, completed=loading.done)
            if loading.error:
                screen.notes.print(f"[bold red]FAILED[/] {escape(loading.key)}: {escape(loading.error)}", highlight=False, soft_wrap=True)

        outcome = await supervisor.start(on_loading)
    if outcome.failed:
        count = f"{len(outcome.failed)} of {len(plan.functions)}"
        screen.notes.print(f"[bold red]{count} functions are NOT served:[/] {escape(', '.join(outcome.failed))}", highlight=False, soft_wrap=True)
    return outcome


async def _introduce(plan: Plan, outcome: Outcome, supervisor: Supervisor, screen: Screen) -> None:
    """What is served, where, and lines to paste."""
    if screen.as_json:
        screen.write(
            {
                "url": plan.url,
                "pid": os.getpid(),
                "run_dir": str(plan.run_dir),
                "functions": [function.key for function in outcome.serving],
                "failed": outcome.failed,
            }
        )
        return
    node = await supervisor.client.status()
    serving = {function.key for function in outcome.serving}
    screen.results.print(status.introduction([entry for entry in node.functions if entry.key in serving]))
    screen.results.print(f"\nServing at {plan.url} on {_devices(node)}. Try:\n", highlight=False, soft_wrap=True)
    for line in await _curl_lines(plan, outcome.serving):
        screen.results.print(f"  {line}", highlight=False, soft_wrap=True, markup=False)
    screen.results.print("\nCtrl-C stops.", highlight=False)


def _devices(node: NodeStatus) -> str:
    return ", ".join(f"{device.device} with {format_bytes(device.capacity_bytes)}" for device in node.devices)


async def _curl_lines(plan: Plan, functions: Sequence[Function]) -> list[str]:
    lines = []
    for function, inputs in await examples.small_inputs(plan.url, functions):
        body = json.dumps({"inputs": inputs})
        lines.append(f"curl -s {plan.url}/v2/models/{function.name}/infer -H 'Content-Type: application/json' -d '{body}'")
    return lines
