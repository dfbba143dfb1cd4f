"""The command line: parses and checks once, then hands frozen values on. Errors go to standard error in one line, with exit code 1."""

from __future__ import annotations

import asyncio
import re
import sys
from pathlib import Path

import click
import msgspec
from rich.console import Console

from contracts.errors import NotFound
from contracts.functions import Share
from contracts.status import FunctionStatus, NodeStatus
from contracts.wire import SetShare
from nodeagent.shell.backends import SM_BACKENDS
from sluice import control, doctor, mig, options, plan_options, profile, simulate, status
from sluice.documents import read_functions
from sluice.plan import Plan, default_device_memory, default_devices, default_host_memory, default_run_dir
from sluice.ports import free_port

_DEVICE = re.compile(r"(cpu|cuda):[0-9]{1,3}|cuda:(GPU|MIG)-[0-9a-fA-F-]+")


def _devices(_ctx: click.Context, _param: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    for value in values:
        if not _DEVICE.fullmatch(value) and values != ("auto",):
            raise click.BadParameter(f"{value!r} is no device: write cpu:0, cuda:0, cuda: with the UUID of a GPU or MIG instance, or auto alone")
    if len(set(values)) != len(values):
        raise click.BadParameter(f"name each device once, got {' '.join(values)}")
    return values


@click.group(
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=options.examples(
        "sluice up examples/functions.yaml                         serve until Ctrl-C",
        "sluice up examples/functions.yaml --demo 30               load it for 30 s, check every answer",
        "sluice status --watch                                     what every function gets, live",
        "sluice share minilm --sm 60 --quota 25                    change a share while it serves",
        "sluice doctor                                             can this machine serve?",
        "sluice profile need minilm --slo-ms 200 --rate 20         the smallest share that keeps an objective",
        "sluice simulate scenario.yaml -o out                      the same policies on a load that you describe",
        "sluice plan functions.yaml --prometheus URL               how many devices would these functions need?",
    ),
)
@click.version_option(package_name="sluice")
def main() -> None:
    """Serve many models on few GPUs, each inside its share."""


main.add_command(mig.command)
main.add_command(profile.command)
main.add_command(simulate.command)
main.add_command(plan_options.command)


@main.command(
    "up",
    epilog=options.examples(
        "sluice up examples/functions.yaml --device-memory 640Mi --demo 30",
        "sluice up a.yaml b.yaml --device cpu:0 --device cpu:1 --port 0 --json",
        "sluice up a.yaml --device cuda:0 --require-limits",
        "sluice up examples/functions.yaml --isolate --idle-seconds 5",
    ),
)
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="FILE...")
@click.option(
    "--device",
    "devices",
    callback=_devices,
    multiple=True,
    default=("auto",),
    metavar="DEVICE",
    help="A device to serve on: cpu:N, cuda:N, cuda:UUID (repeatable). [default: auto, all GPUs, or cpu:0 without any]",
)
@click.option(
    "--device-memory",
    callback=options.size,
    metavar="SIZE",
    help="Memory of each device for weights. [default: of a GPU what lanes leave; of a CPU device a quarter of this machine's, at most 4Gi]",
)
@click.option(
    "--host-memory",
    callback=options.size,
    metavar="SIZE",
    help="Budget of the weights in host memory. [default: four fifths of what /dev/shm has free]",
)
@click.option(
    "--link-bandwidth", callback=options.size, metavar="SIZE", help="Bytes per second from host to a CPU device. [default: as fast as it goes]"
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="Port to listen on; 0 takes a free one.")
@click.option("--grpc-port", type=click.IntRange(1, 65535), help="Port for gRPC; none without it. Not with --isolate.")
@click.option("--isolate", is_flag=True, help="A predictor process for each function, none while nobody calls it.")
@click.option(
    "--idle-seconds", type=click.FloatRange(min=0.1), default=60.0, show_default=True, help="With --isolate: end a predictor that idles so long."
)
@click.option("--demo", "demo_s", type=click.FloatRange(min=1), metavar="SECONDS", help="Load every function so long, check every answer, and end.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the demo's arrivals and inputs.")
@click.option("--threads", type=click.IntRange(1, 256), default=1, show_default=True, help="Compute threads of a CPU lane.")
@click.option("--sm-backend", type=click.Choice(SM_BACKENDS), default="auto", show_default=True, help="What holds a GPU's lanes to their SMs.")
@click.option("--require-limits", is_flag=True, help="Do not start on a GPU on which nothing can hold lanes to their SMs.")
@options.run_dir
@options.as_json
@options.errors_in_one_line
def up_command(
    files: tuple[Path, ...],
    devices: tuple[str, ...],
    device_memory: int | None,
    host_memory: int | None,
    link_bandwidth: int | None,
    host: str,
    port: int,
    grpc_port: int | None,
    isolate: bool,
    idle_seconds: float,
    demo_s: float | None,
    seed: int,
    threads: int,
    sm_backend: str,
    require_limits: bool,
    run_dir: Path | None,
    as_json: bool,
) -> None:
    """Serve the functions of FILE... on this machine until Ctrl-C.

    A FILE holds InferenceService documents, as for a cluster. Without --demo, a function that cannot be loaded is reported and the others are served.
    """
    # Imported here: what it needs takes half a second, which `sluice status` should not wait for.
    from sluice import up

    if isolate and grpc_port is not None:
        raise click.UsageError("--grpc-port and --isolate exclude each other: the router that wakes functions speaks HTTP alone")
    functions = tuple(read_functions(files))
    if devices == ("auto",):
        devices = default_devices()
    plan = Plan(
        functions=functions,
        run_dir=(run_dir or default_run_dir()).absolute(),
        devices=devices,
        device_memory=device_memory or default_device_memory(devices),
        host_memory=host_memory or default_host_memory(),
        link_bytes_per_s=link_bandwidth,
        threads=threads,
        host=host,
        port=port or free_port(host),
        isolate=isolate,
        idle_s=idle_seconds,
        grpc_port=grpc_port,
        sm_backend=sm_backend,
        require_limits=require_limits,
    )
    demo = None if demo_s is None else up.DemoOptions(demo_s, seed)
    sys.exit(asyncio.run(up.run(plan, demo, as_json=as_json)))


@main.command(
    "status",
    epilog=options.examples(
        "sluice status",
        "sluice status --watch",
        "sluice status --json | jq '.functions[] | {key, rate}'",
    ),
)
@click.option("--watch", is_flag=True, help="Show it live, until Ctrl-C.")
@options.run_dir
@options.as_json
@options.errors_in_one_line
def status_command(watch: bool, run_dir: Path | None, as_json: bool) -> None:
    """Show what every function has and gets: share, residence, rate, latency, GPU time, swaps."""
    folder = (run_dir or default_run_dir()).absolute()
    if as_json:
        click.echo(msgspec.json.encode(control.read_status(folder)).decode())
    elif watch:
        status.watch(lambda: control.read_status(folder))
    else:
        status.console().print(status.render(control.read_status(folder)))


@main.command(
    "share",
    epilog=options.examples(
        "sluice share minilm --sm 60 --quota 25",
        "sluice share team-a/resnet50 --quota 5 --limit 50",
    ),
)
@click.argument("function")
@click.option("--sm", type=int, help="Percent of the SMs, 1 to 100.")
@click.option("--quota", type=float, help="Percent of the time that is guaranteed, 0.01 to 100.")
@click.option("--limit", type=float, help="Percent of the time that it may reach by borrowing, from the quota to 100.")
@options.run_dir
@options.as_json
@options.errors_in_one_line
def share_command(function: str, sm: int | None, quota: float | None, limit: float | None, run_dir: Path | None, as_json: bool) -> None:
    """Change the share of FUNCTION (a name, or namespace/name) while it serves. What is not given stays."""
    if sm is None and quota is None and limit is None:
        raise click.UsageError("give at least one of --sm, --quota, --limit")
    folder = (run_dir or default_run_dir()).absolute()
    found = _find(control.read_status(folder), function)
    before = found.share
    after = Share.of(
        before.sm_percent if sm is None else sm,
        before.quota_percent if quota is None else quota,
        before.limit_percent if limit is None else limit,
    )
    control.call(folder, lambda id_: SetShare(id_, found.key, after))
    if as_json:
        click.echo(msgspec.json.encode({"function": found.key, "before": before, "after": after}).decode())
    else:
        click.echo(f"{found.key}: {status.share_text(before)} -> {status.share_text(after)}")


def _find(node: NodeStatus, function: str) -> FunctionStatus:
    found = [entry for entry in node.functions if function in (entry.key, entry.key.partition("/")[2])]
    if not found:
        known = ", ".join(entry.key for entry in node.functions[:20]) or "none"
        raise NotFound(f"no function {function!r} on this node (there are: {known})")
    if len(found) > 1:
        raise NotFound(f"{function!r} is not unique: write one of {', '.join(entry.key for entry in found)}")
    return found[0]


@main.command(
    "doctor",
    epilog=options.examples(
        "sluice doctor",
        "sluice doctor --require-limits --json                     fails where a GPU's SM limits cannot be proven",
    ),
)
@click.option(
    "--sm-backend", type=click.Choice(SM_BACKENDS), default="auto", show_default=True, help="What is to hold the lanes of GPUs to their SMs."
)
@click.option("--require-limits", is_flag=True, help="Fail where a GPU's lanes cannot be held to a part of its SMs.")
@options.run_dir
@options.as_json
@options.errors_in_one_line
def doctor_command(sm_backend: str, require_limits: bool, run_dir: Path | None, as_json: bool) -> None:
    """Check whether this machine can serve, and say what to do where it cannot. Exit code 1 when a check fails.

    On each GPU a lane is started and has to prove that it is held to half of the SMs, which takes some seconds.
    """
    # Imported here: numpy takes a moment that `sluice status` should not wait for.
    from sluice import doctor_gpus

    checks = doctor.examine((run_dir or default_run_dir()).absolute())
    with Console(stderr=True).status("trying each GPU"):
        checks += doctor_gpus.examine(sm_backend, require_limits)
    if as_json:
        click.echo(msgspec.json.encode(checks).decode())
    else:
        status.console().print(doctor.render(checks))
    sys.exit(1 if any(check.outcome == doctor.FAIL for check in checks) else 0)
