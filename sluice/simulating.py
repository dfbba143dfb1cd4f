"""What `sluice simulate` does: plays a scenario under its policies, in parallel processes, and shows and writes what came of it."""

from __future__ import annotations

import json
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from contracts.errors import InvalidValue
from simulator import against, page, report
from simulator.run import check, simulate
from simulator.scenario import Scenario, build, load
from simulator.timeline import Timeline


def run(path: Path, policies: tuple[str, ...], seeds: int, processes: int, output: Path | None, real: Path | None, as_json: bool) -> None:
    """Simulates a scenario file, and says how far Sluice's policy is off a `real` run; InvalidArtifact or InvalidValue when a file is wrong."""
    read = load(path)
    asked = msgspec.structs.replace(read, policies=policies or read.policies)
    check(asked.policies)
    build(asked, 0)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
    record = None if real is None else _record(real, asked, seeds)
    done = _all(asked, seeds, processes, output)
    figures = {policy: [done[policy, seed].figures for seed in range(seeds)] for policy in asked.policies}
    found = report.document(asked, figures, {policy: done[policy, 0].functions for policy in asked.policies})
    lines = [] if record is None else against.compare(record, done["sluice", record.seed].figures, done["sluice", record.seed].functions)
    if record is not None:
        found["against"] = msgspec.to_builtins(lines)
    if output is not None:
        (output / "report.json").write_text(json.dumps(found, indent=1))
        page.write(output, asked, figures, {policy: done[policy, 0].curve for policy in asked.policies}, found)
    if as_json:
        click.echo(json.dumps(found))
    else:
        Console().print(report.table(asked, figures))
        if record is not None:
            Console().print(against.table(record, lines))


def _record(path: Path, scenario: Scenario, seeds: int) -> against.Real:
    if "sluice" not in scenario.policies:
        raise InvalidValue("a real run is of the policy sluice, which is not simulated", key="--against", value=str(path))
    return against.read(path, scenario.name, seeds)


@dataclass(frozen=True, slots=True)
class _Done:
    """One policy with one seed."""

    figures: dict[str, float]
    functions: list[dict[str, Any]]
    curve: list[tuple[float, float]]


def _all(scenario: Scenario, seeds: int, processes: int, output: Path | None) -> dict[tuple[str, int], _Done]:
    """Every policy with every seed."""
    jobs = [(policy, seed) for policy in scenario.policies for seed in range(seeds)]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    done = {}
    with ProcessPoolExecutor(min(processes, len(jobs))) as pool, Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("simulating", total=len(jobs))
        running = {pool.submit(_one, scenario, policy, seed, output): (policy, seed) for policy, seed in jobs}
        for future in as_completed(running):
            done[running[future]] = future.result()
            bar.advance(task)
    return done


def _one(scenario: Scenario, policy: str, seed: int, output: Path | None) -> _Done:
    """In a process of its own. The first seed of Sluice's policy is drawn."""
    world = build(scenario, seed)
    timeline = Timeline() if output is not None and policy == "sluice" and seed == 0 else None
    outcome = simulate(policy, world, timeline=timeline)
    if timeline is not None and output is not None:
        timeline.write(output / "timeline.json")
    return _Done(report.figures(world, outcome), report.functions(world, outcome), report.curve(outcome))
