"""The demo: real inputs, a warm-up, an open-loop load over HTTP, then every answer against the unswapped model.

Owns the order of these steps. What is sent is `load`'s, what is right is `check`'s (another process), what it comes to is `report`'s.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import aiohttp
import msgspec
import numpy as np
from numpy.typing import NDArray
from rich.progress import Progress

from contracts.errors import SluiceError
from contracts.functions import Function
from sluice.control import Client
from sluice.demo import report
from sluice.demo.load import Answer, Load, Target, decode_answer, rate_for, request_body, session
from sluice.demo.report import Checked, Report
from sluice.demo.work import Batch, Result, Task, write_tasks
from sluice.plan import Plan
from sluice.predictors import last_words
from sluice.processes import Child, describe_exit

_SAMPLES = 8
_WARM_UP_CALLS = 4


async def run(plan: Plan, functions: Sequence[Function], seconds: float, seed: int, client: Callable[[], Client], progress: Progress) -> Report:
    """Loads the node at `plan.url` for so long; `client` gives the connection to the agent that runs now."""
    folder = plan.run_dir / "demo"
    folder.mkdir(mode=0o700, exist_ok=True)
    tasks = [Task(number, function.key, function.model, _SAMPLES, seed) for number, function in enumerate(functions)]
    write_tasks(folder, tasks)
    with progress:
        step = progress.add_task("making real inputs", total=1)
        await _checker("inputs", folder, plan.threads, lambda _: None)
        progress.update(step, completed=1)
        targets = [_target(folder, task, function) for task, function in zip(tasks, functions, strict=True)]
        async with session() as http:
            await _warm_up(plan.url, http, targets, progress)
            before = await client().status()
            await _load(plan.url, http, targets, seconds, seed, progress)
            after = await client().status()
        checked = await _check(folder, tasks, targets, plan.threads, progress)
    return report.make(targets, checked, before, after, seconds, seed)


async def _warm_up(url: str, http: aiohttp.ClientSession, targets: list[Target], progress: Progress) -> None:
    """A few calls of each function, one at a time: the first is cold, the others say how long a run takes, and so what rate the share can bear."""
    step = progress.add_task("warming up", total=_WARM_UP_CALLS * len(targets))
    load = Load(url, http, lambda: progress.advance(step))
    for target in targets:
        replies = [await load.ask(target, call % len(target.bodies), time.monotonic(), warm_up=True) for call in range(_WARM_UP_CALLS)]
        runs = [float(decode_answer(reply.body).parameters.get("sluice_run_ms", 0)) / 1000 for reply in replies[1:] if reply.answered]
        if not runs:
            raise SluiceError(f"{target.function.key} does not answer: {replies[-1].error}")
        target.rate = rate_for(target.function, statistics.median(runs), len(target.bodies[0]))


async def _load(url: str, http: aiohttp.ClientSession, targets: list[Target], seconds: float, seed: int, progress: Progress) -> None:
    step = progress.add_task(f"loading for {seconds:g} s", total=round(seconds * sum(target.rate for target in targets)))
    await Load(url, http, lambda: progress.advance(step)).drive(targets, seconds, seed)
    progress.update(step, total=sum(not reply.warm_up for target in targets for reply in target.replies))


async def _check(folder: Path, tasks: list[Task], targets: list[Target], threads: int, progress: Progress) -> dict[str, Checked]:
    counts = {task.function: Checked() for task in tasks}
    for task, target in zip(tasks, targets, strict=True):
        counts[task.function].unchecked = _leave_answers(folder, task, target)
    step = progress.add_task("checking every answer", total=sum(reply.answered for target in targets for reply in target.replies))

    def on_result(result: Result) -> None:
        count = counts[result.function]
        count.right += result.right
        count.wrong += result.wrong
        count.detail = count.detail or result.detail
        progress.advance(step, result.right + result.wrong)

    await _checker("answers", folder, threads, on_result)
    return counts


def _target(folder: Path, task: Task, function: Function) -> Target:
    samples: list[dict[str, NDArray[np.generic]]] = [{} for _ in range(task.samples)]
    with np.load(folder / task.inputs_file) as arrays:
        for key in arrays.files:
            number, _, name = key.partition("/")
            samples[int(number)][name] = arrays[key]
    return Target(function, [request_body(sample) for sample in samples])


def _leave_answers(folder: Path, task: Task, target: Target) -> int:
    """Writes the answers and the batches that they ran in; returns how many answers belong to a batch that cannot be put together again."""
    answers = {number: decode_answer(reply.body) for number, reply in enumerate(target.replies) if reply.answered}
    arrays = {f"{number}/{name}": array for number, answer in answers.items() for name, array in answer.outputs.items()}
    batches = batches_of(answers, {number: target.replies[number].instance for number in answers})
    whole = [Batch(members, tuple(target.replies[number].sample for number in members)) for members in batches]
    np.savez(folder / task.answers_file, **arrays)  # type: ignore[arg-type]
    (folder / task.batches_file).write_bytes(msgspec.json.encode(whole))
    return len(answers) - sum(map(len, batches))


def batches_of(answers: dict[int, Answer], instances: dict[int, str]) -> list[tuple[int, ...]]:
    """The request numbers of each batch whose rows are all here, in row order. The predictor process that counted a batch tells equal ids apart."""
    rows: dict[tuple[str, object, object], dict[int, int]] = defaultdict(dict)
    for number, answer in answers.items():
        given = answer.parameters
        rows[instances[number], given.get("sluice_batch"), given.get("sluice_batch_rows")][int(given.get("sluice_batch_row", -1))] = number
    found = []
    for (_, _, total), members in rows.items():
        expected = 0
        for row in sorted(members):
            if row != expected:
                break
            expected += len(next(iter(answers[members[row]].outputs.values())))
        if expected == total:
            found.append(tuple(members[row] for row in sorted(members)))
    return found


async def _checker(what: str, folder: Path, threads: int, on_result: Callable[[Result], None]) -> None:
    def on_line(_name: str, line: str) -> None:
        if line.startswith("{"):
            on_result(msgspec.json.decode(line, type=Result))

    child = Child("checker", [sys.executable, "-m", "sluice.demo.check", what, str(folder), "--threads", str(threads)], on_line)
    try:
        code = await child.wait()
    finally:
        await child.stop(grace_s=2)
    if code:
        raise SluiceError(f"the checker {describe_exit(code)}: {last_words(child)}")
