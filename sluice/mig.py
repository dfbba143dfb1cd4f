"""`sluice mig`: a GPU cut into MIG instances, each a device of its own: what is there, what functions need, and the way from one to the other."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import click
import msgspec
from rich.table import Table

from contracts.errors import InvalidValue, Unavailable
from contracts.units import format_bytes, parse_bytes
from nodeagent import mig as planner
from nodeagent.mig import Instance, Want
from nodeagent.shell import mig
from nodeagent.shell.mig import Existing, Step
from nodeagent.shell.nvml import Gpu, Nvml
from sluice import control, options, status
from sluice.plan import default_run_dir

_WANT = re.compile(r"(?P<name>[^=]+)=(?P<size>[^@]+)(@(?P<sm>[0-9]{1,3}))?")


def _wants(_ctx: click.Context, _param: click.Parameter, values: tuple[str, ...]) -> tuple[Want, ...]:
    found = []
    for value in values:
        match = _WANT.fullmatch(value)
        if match is None:
            raise click.BadParameter(f"{value!r}: write NAME=SIZE or NAME=SIZE@SM, for example bert=18Gi@40")
        try:
            memory = parse_bytes(match["size"])
        except ValueError as error:
            raise click.BadParameter(f"{value!r}: {error}") from None
        sm = int(match["sm"] or 1)
        if not 1 <= sm <= 100:
            raise click.BadParameter(f"{value!r}: the SM percentage must be 1 to 100")
        found.append(Want(match["name"], memory, sm))
    names = [want.function for want in found]
    if len(set(names)) != len(names):
        raise click.BadParameter(f"name each function once, got {' '.join(names)}")
    return tuple(found)


@click.group(
    "mig",
    epilog=options.examples(
        "sluice mig show",
        "sluice mig plan                                           instances for the functions of the node that runs here",
        "sluice mig plan --function bert=18Gi@40 --function tiny=4Gi",
        "sluice mig apply --function bert=18Gi@40                  what would be done",
        "sluice mig apply --function bert=18Gi@40 --yes            does it, on idle GPUs",
    ),
)
def command() -> None:
    """Cut GPUs into MIG instances, each a device of its own with its own memory, caches and SMs.

    MIG mode itself is never switched: that is the administrator's (nvidia-smi -mig 1).
    """


_functions = click.option(
    "--function",
    "wants",
    callback=_wants,
    multiple=True,
    metavar="NAME=SIZE[@SM]",
    help="Device memory of a function, and the percentage of a GPU's SMs that it needs (repeatable). [default: the functions of the running node]",
)


@command.command("show")
@options.as_json
@options.errors_in_one_line
def show_command(as_json: bool) -> None:
    """Show the instances that are there, and what each GPU can be cut into."""
    with Nvml() as nvml:
        gpus = nvml.gpus()
        there = {gpu.index: mig.existing(nvml, gpu.index) for gpu in gpus}
        sizes = {gpu.index: mig.profiles(nvml, gpu.index) for gpu in gpus}
    if as_json:
        found = [{"gpu": gpu, "instances": there[gpu.index], "profiles": sizes[gpu.index]} for gpu in gpus]
        click.echo(msgspec.json.encode(found).decode())
        return
    for gpu in gpus:
        can = ", ".join(f"{len(profile.places)} x {profile.name}" for profile in sizes[gpu.index]) or _why_none(gpu)
        click.echo(f"GPU {gpu.index}: {gpu.name}, {format_bytes(gpu.memory_bytes)}: {can}")
        if there[gpu.index]:
            status.console().print(_existing_table(there[gpu.index]))


@command.command("plan")
@_functions
@options.run_dir
@options.as_json
@options.errors_in_one_line
def plan_command(wants: tuple[Want, ...], run_dir: Path | None, as_json: bool) -> None:
    """Find the smallest instance for each function, on the fewest GPUs. Changes nothing."""
    with Nvml() as nvml:
        planned = _plan(nvml, wants, run_dir)
    if as_json:
        click.echo(msgspec.json.encode(planned).decode())
    else:
        status.console().print(_plan_table(planned))


@command.command("apply")
@_functions
@click.option("--yes", is_flag=True, help="Do it. Without it the steps are only shown.")
@options.run_dir
@options.as_json
@options.errors_in_one_line
def apply_command(wants: tuple[Want, ...], yes: bool, run_dir: Path | None, as_json: bool) -> None:
    """Make the planned instances, and end those that are in their way, on idle GPUs. Shows the steps, and takes them with --yes."""
    with Nvml() as nvml:
        planned = _plan(nvml, wants, run_dir)
        there = [instance for gpu in nvml.gpus() for instance in mig.existing(nvml, gpu.index)]
        steps = mig.steps(planned, there)
        for step in mig.apply(nvml, steps) if yes else steps:
            click.echo(msgspec.json.encode(step).decode() if as_json else _step_text(step, yes))
    if not as_json:
        click.echo(_summary(steps, yes))


def _plan(nvml: Nvml, wants: Sequence[Want], run_dir: Path | None) -> tuple[Instance, ...]:
    """Over the GPUs in MIG mode, which must be alike."""
    gpus = [gpu for gpu in nvml.gpus() if gpu.mig]
    if not gpus:
        raise Unavailable("no GPU of this machine has MIG mode on: nvidia-smi -i N -mig 1 switches it on (an administrator, on an idle GPU)")
    if len({(gpu.name, gpu.memory_bytes) for gpu in gpus}) > 1:
        raise InvalidValue("the GPUs in MIG mode are not alike", key="gpus", value=", ".join(gpu.name for gpu in gpus))
    found = planner.plan(wants or _running(run_dir), mig.profiles(nvml, gpus[0].index), len(gpus))
    return tuple(msgspec.structs.replace(instance, gpu=gpus[instance.gpu].index) for instance in found)


def _running(run_dir: Path | None) -> tuple[Want, ...]:
    """The functions of the node that runs here."""
    node = control.read_status((run_dir or default_run_dir()).absolute())
    return tuple(Want(function.key, function.weight_bytes, function.share.sm_percent) for function in node.functions)


def _why_none(gpu: Gpu) -> str:
    return "no MIG on this GPU" if gpu.mig is None else "MIG mode is off" if not gpu.mig else "cannot be cut"


def _step_text(step: Step, done: bool) -> str:
    verb = {("make", False): "would make", ("make", True): "made", ("end", False): "would end", ("end", True): "ended"}[step.act, done]
    return f"GPU {step.gpu}: {verb} {step.profile} at slice {step.start}" + (f" for {step.function}" if step.function else "")


def _summary(steps: Sequence[Step], done: bool) -> str:
    if not steps:
        return "nothing to do: the instances are as planned"
    return f"{len(steps)} steps taken" if done else f"{len(steps)} steps; nothing was changed (--yes takes them)"


def _plan_table(planned: Sequence[Instance]) -> Table:
    rows = [
        (str(one.gpu), str(one.start), one.profile.name, format_bytes(one.profile.memory_bytes), str(one.profile.sms), one.function)
        for one in planned
    ]
    return _table(("GPU", "slice", "instance", "memory", "SMs", "function"), rows)


def _existing_table(there: Sequence[Existing]) -> Table:
    rows = [
        (str(one.start), one.profile, format_bytes(one.memory_bytes), one.uuid or "(no compute instance)", " ".join(map(str, one.busy)) or "idle")
        for one in there
    ]
    return _table(("slice", "instance", "memory", "UUID", "processes"), rows)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*row)
    return table
