"""`sluice simulate`: its options. What it does is `sluice.simulating`, imported when it runs, for it takes a second to import."""

from __future__ import annotations

import os
from pathlib import Path

import click

from sluice import options


@click.command(
    "simulate",
    epilog=options.examples(
        "sluice simulate benchmarks/scenarios/many-functions.yaml",
        "sluice simulate benchmarks/scenarios/many-functions.yaml --policy sluice --policy torpor --seeds 5 -o out",
    ),
)
@click.argument("scenario", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--policy", "policies", multiple=True, help="Only this one, instead of the file's (repeatable); an unknown name lists all.")
@click.option("--seeds", default=1, show_default=True, type=click.IntRange(min=1), help="Runs of each policy; all policies see the same ones.")
@click.option("--processes", default=os.cpu_count() or 1, show_default=True, type=click.IntRange(min=1), help="Runs at the same time.")
@click.option("-o", "--output", type=click.Path(file_okay=False, path_type=Path), help="Folder for index.html, plots, report.json and timeline.json.")
@click.option("--against", type=click.Path(dir_okay=False, path_type=Path), help="Record of the same scenario run for real: show what is off.")
@options.as_json
@options.errors_in_one_line
def command(scenario: Path, policies: tuple[str, ...], seeds: int, processes: int, output: Path | None, against: Path | None, as_json: bool) -> None:
    """Simulate SCENARIO (YAML): the node agent's own policies beside the baselines, under the same load."""
    from sluice import simulating

    simulating.run(scenario, policies, seeds, processes, output, against, as_json)
