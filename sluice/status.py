"""`sluice status`: a node's status as tables for people. Reads nothing itself; `watch` is given the function that does."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from contracts.functions import FunctionClass, Share
from contracts.status import DeviceStatus, FunctionStatus, NodeStatus
from contracts.units import S, format_bytes

_STATE_STYLE = {"ready": "green", "loading": "yellow", "failed": "bold red"}
_REFRESH_S = 1.0
_FILE_WIDTH = 160


def console(*, stderr: bool = False) -> Console:
    """A console that never cuts a table short because nobody looks at it: a file or a pipe is as wide as needed."""
    found = Console(stderr=stderr)
    return found if found.is_terminal else Console(stderr=stderr, width=_FILE_WIDTH)


def share_text(share: Share) -> str:
    """A share as people read it: 40 % SM x 12.5 % of the time (limit 100 %)."""
    return f"{share.sm_percent} % SM x {share.quota_percent:g} % of the time (limit {share.limit_percent:g} %)"


def render(node: NodeStatus) -> RenderableType:
    """Devices above, functions below."""
    host = f"host memory {format_bytes(node.host_used_bytes)} of {format_bytes(node.host_budget_bytes)}"
    head = Text(f"agent {node.pid}, up {node.uptime_ns / S:.0f} s, {host}", style="dim")
    return Group(head, _devices(node.devices), *_gpus(node.devices), _functions(node.functions))


def watch(read: Callable[[], NodeStatus]) -> None:
    """Shows it live until Ctrl-C; the error of `read` ends it."""
    shown = console()
    with contextlib.suppress(KeyboardInterrupt), Live(render(read()), console=shown, auto_refresh=False, screen=shown.is_terminal) as live:
        while True:
            time.sleep(_REFRESH_S)
            live.update(render(read()), refresh=True)


def _devices(devices: Sequence[DeviceStatus]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column, justify in _columns("device", "memory|", "running SM|", "GPU time|", "swaps|", "swapped in|", "lanes"):
        table.add_column(column, justify=justify)
    for device in devices:
        lanes = ", ".join(f"{lane.sm_percent} % {_short(lane.cls)} {lane.state}" for lane in device.lanes) or "none"
        table.add_row(
            device.device,
            f"{format_bytes(device.used_bytes)} of {format_bytes(device.capacity_bytes)}",
            f"{device.running_sm} %",
            f"{device.busy_ns / S:.2f} s",
            str(device.swaps),
            format_bytes(device.swapped_bytes),
            lanes,
        )
    return table


def _gpus(devices: Sequence[DeviceStatus]) -> Iterator[Text]:
    """A line for each GPU: what holds its lanes to their SMs. One that is less than all is hard to overlook."""
    for device in devices:
        if device.backend != "pace":
            style = {"mps": "dim", "green": "yellow"}.get(device.backend, "bold red")
            yield Text(f"{device.device}: SMs are held by {device.backend}: {device.why}", style=style)
        if device.state != "up":
            yield Text(f"{device.device} is {device.state}: it is being brought back", style="bold red")
        unpinned = max((lane.unpinned for lane in device.lanes), default=0)
        if unpinned:
            yield Text(f"{device.device}: the weights of {unpinned} functions cannot be pinned in host memory: their swaps are slow", style="yellow")


def introduction(functions: Sequence[FunctionStatus]) -> Table:
    """What each function has, before anything was asked of it."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column, justify in _columns("function", "class", "SM|", "quota|", "limit|", "weights|", "SLO|"):
        table.add_column(column, justify=justify, no_wrap=True)
    for entry in functions:
        share = entry.share
        quota, limit = f"{share.quota_percent:g} %", f"{share.limit_percent:g} %"
        table.add_row(entry.key, entry.cls, f"{share.sm_percent} %", quota, limit, format_bytes(entry.weight_bytes), f"{entry.slo_ms:g} ms")
    return table


def _functions(functions: Sequence[FunctionStatus]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    columns = ("function", "", "state", "SM x quota|", "on", "queue|", "rate/s|", "p50/95/99 ms|", "SLO ms|", "met|", "GPU s|", "swaps|", "failed|")
    for column, justify in _columns(*columns):
        table.add_column(column, justify=justify, no_wrap=column not in ("state", "on"))
    for entry in functions:
        latency = entry.latency
        answered = entry.answered > 0
        table.add_row(
            entry.key,
            _short(entry.cls),
            _state(entry),
            f"{entry.share.sm_percent} x {entry.share.quota_percent:g} %",
            ", ".join(entry.resident_on) or "host",
            str(entry.queued),
            f"{entry.rate:.1f}",
            "/".join(f"{value:.0f}" if value >= 10 else f"{value:.1f}" for value in (latency.p50_ms, latency.p95_ms, latency.p99_ms))
            if answered
            else "-",
            f"{entry.slo_ms:g}",
            f"{100 * entry.slo_met / entry.answered:.1f} %" if answered else "-",
            f"{entry.gpu_ns / S:.2f}",
            str(entry.swaps),
            str(entry.failed),
        )
    return table


def _state(entry: FunctionStatus) -> Text:
    state = Text(entry.state, style=_STATE_STYLE.get(entry.state, ""))
    if entry.reason:
        state.append(f": {entry.reason}", style="red")
    return state


def _columns(*names: str) -> Iterator[tuple[str, Literal["left", "right"]]]:
    """(title, justification): a bar at the end of a name means right."""
    for name in names:
        yield name.removesuffix("|"), "right" if name.endswith("|") else "left"


def _short(cls: FunctionClass) -> str:
    return "LS" if cls is FunctionClass.LATENCY_SENSITIVE else "BE"
