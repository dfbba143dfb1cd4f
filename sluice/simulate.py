"""`sluice simulate`: plays a scenario file under one or several policies, in parallel processes, and shows and writes what came of it."""

from __future__ import annotations

import json
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from simulator import page, report
from simulator.run import POLICIES, simulate
from simulator.scenario import Scenario, build, load
from simulator.timeline import Timeline


@click.command("simulate")
@click.argument("scenario", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--policy", "policies", multiple=True, type=click.Choice(list(POLICIES)), help="Only these, instead of the file's; may be repeated.")
@click.option("--seeds", default=1, show_default=True, type=click.IntRange(min=1), help="Runs of each policy; all policies see the same ones.")
@click.option("--processes", default=os.cpu_count() or 1, show_default=True, type=click.IntRange(min=1), help="Runs at the same time.")
@click.option("-o", "--output", type=click.Path(file_okay=False, path_type=Path), help="Folder for index.html, plots, report.json and timeline.json.")
@click.option("--json", "as_json", is_flag=True, help="Write JSON, for machines.")
def command(scenario: Path, policies: tuple[str, ...], seeds: int, processes: int, output: Path | None, as_json: bool) -> None:
    r"""Simulates SCENARIO (YAML): the node agent's own policies and the baselines, under the same load.

    \b
    Examples:
      sluice simulate benchmarks/scenarios/many-functions.yaml
      sluice simulate benchmarks/scenarios/many-functions.yaml --policy sluice --policy lalb-o3 --seeds 5 -o out
    """
    read = load(scenario)
    asked = msgspec.structs.replace(read, policies=policies or read.policies)
    build(asked, 0)  # so that a wrong scenario is refused before anything runs
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
    done = _all(asked, seeds, processes, output)
    figures = {policy: [done[policy, seed].figures for seed in range(seeds)] for policy in asked.policies}
    found = report.document(asked, figures, {policy: done[policy, 0].functions for policy in asked.policies})
    if output is not None:
        (output / "report.json").write_text(json.dumps(found, indent=1))
        page.write(output, asked, figures, {policy: done[policy, 0].curve for policy in asked.policies}, found)
    if as_json:
        click.echo(json.dumps(found))
    else:
        Console().print(report.table(asked, figures))


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
