"""`sluice plan`: its options. What it does is `sluice.planning`, imported when it runs, for it takes a second to import."""

from __future__ import annotations

import os
import re
from pathlib import Path

import click

from sluice import options

_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}


def _seconds(_ctx: click.Context, _param: click.Parameter, value: str | None) -> int | None:
    """A time as Prometheus writes it: 90s, 24h, 7d."""
    if value is None:
        return None
    found = re.fullmatch(r"([1-9][0-9]{0,8})([smhdw])", value.strip())
    if not found:
        raise click.BadParameter(f"{value!r} is no time: write 60s, 30m, 24h or 7d")
    return int(found[1]) * _UNITS_S[found[2]]


def _by_name(_ctx: click.Context, _param: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    """`NAME=VALUE`, or a VALUE for all others, under the name ""."""
    found: dict[str, str] = {}
    for value in values:
        name, equals, text = value.rpartition("=")
        if name in found or (equals and not name):
            raise click.BadParameter(f"{value!r}: write NAME=VALUE once for each function, or VALUE once for all others")
        found[name] = text
    return found


def _dollars(_ctx: click.Context, _param: click.Parameter, value: str) -> float:
    try:
        found = float(value.removesuffix("/h"))
    except ValueError:
        found = -1.0
    if not 0 <= found < float("inf"):
        raise click.BadParameter(f"{value!r} is no price: write 2.5 or 2.5/h")
    return found


@click.command(
    "plan",
    epilog=options.examples(
        "sluice plan functions.yaml --prometheus http://127.0.0.1:9090 --since 7d --latency-from-prometheus --weights 400Mi",
        "sluice plan functions.yaml --trace calls.csv --profile points.parquet --device-memory 80Gi --device-cost 2.5/h -o out",
        "sluice plan functions.yaml --trace calls.csv --run-ms resnet50=8..12 --run-ms 20 --weights 400Mi --json",
    ),
)
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="FILE...")
@click.option("--trace", type=click.Path(path_type=Path), help="The load: a public trace's format (docs/plan.md), gzipped or not.")
@click.option("--prometheus", metavar="URL", help="The load: rates that a Prometheus has seen. It is only read.")
@click.option("--since", callback=_seconds, default="24h", show_default=True, metavar="TIME", help="With --prometheus: how far back.")
@click.option("--step", callback=_seconds, default="60s", show_default=True, metavar="TIME", help="With --prometheus: at least its scrape interval.")
@click.option(
    "--metrics",
    type=click.Choice(["auto", "sluice", "knative", "knative-opencensus", "kserve"]),
    default="auto",
    show_default=True,
    help="With --prometheus: who counted the requests.",
)
@click.option("--query-rate", default="", metavar="PROMQL", help="Instead: requests/s by series; $window is the range for rate().")
@click.option("--query-latency", default="", metavar="PROMQL", help="Mean latencies in seconds by series, for --latency-from-prometheus.")
@click.option("--token-file", type=click.Path(path_type=Path, dir_okay=False), help="Bearer token for the Prometheus.")
@click.option("--ca-file", type=click.Path(path_type=Path, dir_okay=False), help="Certificates to trust for https. [default: the system's]")
@click.option("--profile", type=click.Path(path_type=Path, dir_okay=False), help="Run times: a table that `sluice profile sweep` wrote.")
@click.option("--estimator", type=click.Path(path_type=Path, dir_okay=False), help="With --profile: what `sluice profile fit` wrote.")
@click.option("--device", help="With --profile: the device's id in the table, when it holds several.")
@click.option("--latency-from-prometheus", is_flag=True, help="Run times: the latencies that the Prometheus has seen, as an upper bound.")
@click.option("--run-ms", callback=_by_name, multiple=True, metavar="[NAME=]MS[..MS]", help="Run time of a request on a whole device (repeatable).")
@click.option(
    "--weights", callback=_by_name, multiple=True, metavar="[NAME=]SIZE", help="Size of the weights, where no profile knows it (repeatable)."
)
@click.option("--slo-ms", callback=_by_name, multiple=True, metavar="[NAME=]MS", help="Objective in place of the documents' (repeatable).")
@click.option("--device-memory", callback=options.size, default="80Gi", show_default=True, metavar="SIZE", help="Memory of a device.")
@click.option("--link-gb-per-s", type=click.FloatRange(min=0, min_open=True), default=12.0, show_default=True, help="From host to device.")
@click.option("--devices-per-node", type=click.IntRange(1, 64), default=8, show_default=True, help="Devices on a node.")
@click.option("--device-cost", callback=_dollars, default="0", metavar="DOLLARS", help="Of a device for an hour: 2.5 or 2.5/h.")
@click.option("--now", type=click.FloatRange(min=0), help="Devices that serve all this now. [default: what Prometheus or the documents say]")
@click.option("--max-devices", type=click.IntRange(1, 1024), default=256, show_default=True, help="Plan for no more.")
@click.option("--spell", callback=_seconds, default="10m", show_default=True, metavar="TIME", help="Length of the spells that are simulated.")
@click.option("--spells", type=click.IntRange(1, 100), default=2, show_default=True, help="How many of them, the busiest first.")
@click.option("--seeds", type=click.IntRange(min=1), default=1, show_default=True, help="Draws of the load; objectives hold over all of them.")
@click.option("--processes", default=os.cpu_count() or 1, show_default=True, type=click.IntRange(min=1), help="Simulations at the same time.")
@click.option("-o", "--output", type=click.Path(file_okay=False, path_type=Path), help="Folder for plan.json and the plots.")
@options.as_json
@options.errors_in_one_line
def command(files: tuple[Path, ...], **given: object) -> None:
    """Say how many devices the functions of FILE... need for their objectives, who should share, and what that saves against what runs now.

    A FILE holds InferenceService documents of any runtime, as `kubectl get inferenceservices -A -o yaml` writes them. Exit code 3 when a function
    cannot be served on such devices at all.
    """
    if (given["trace"] is None) == (given["prometheus"] is None):
        raise click.UsageError("give either --trace or --prometheus")
    if given["prometheus"] is None and (given["latency_from_prometheus"] or given["query_rate"] or given["query_latency"]):
        raise click.UsageError("--latency-from-prometheus and the queries need --prometheus")
    from sluice import planning

    if not planning.run(files, planning.Options(**given)):  # type: ignore[arg-type]  # the options above, by their names
        raise SystemExit(3)
