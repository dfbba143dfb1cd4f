"""`sluice status`: a node's status as tables for people. Reads nothing itself; `watch` is given the function that does."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from contracts.functions import FunctionClass, Share
from contracts.units import S, format_bytes
from contracts.wire import DeviceStatus, FunctionStatus, NodeStatus

_STATE_STYLE = {"ready": "green", "loading": "yellow", "failed": "bold red"}
_REFRESH_S = 1.0


def share_text(share: Share) -> str:
    """A share as people read it: 40 % SM x 12.5 % of the time (limit 100 %)."""
    return f"{share.sm_percent} % SM x {share.quota_percent:g} % of the time (limit {share.limit_percent:g} %)"


def render(node: NodeStatus) -> RenderableType:
    """Devices above, functions below."""
    host = f"host memory {format_bytes(node.host_used_bytes)} of {format_bytes(node.host_budget_bytes)}"
    head = Text(f"agent {node.pid}, up {node.uptime_ns / S:.0f} s, {host}", style="dim")
    return Group(head, _devices(node.devices), functions_table(node.functions))


def watch(console: Console, read: Callable[[], NodeStatus]) -> None:
    """Shows it live until Ctrl-C; the error of `read` ends it."""
    with contextlib.suppress(KeyboardInterrupt), Live(render(read()), console=console, auto_refresh=False, screen=console.is_terminal) as live:
        while True:
            time.sleep(_REFRESH_S)
            live.update(render(read()), refresh=True)


def _devices(devices: tuple[DeviceStatus, ...]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("device", "memory", "running SM", "GPU time", "swaps", "swapped in", "lanes"):
        table.add_column(column, justify="left" if column in ("device", "lanes") else "right")
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


def functions_table(functions: tuple[FunctionStatus, ...]) -> Table:
    """A line for each function."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    right = ("SM", "quota", "limit", "weights", "queued", "rate/s", "p50 ms", "p95 ms", "p99 ms", "SLO ms", "SLO met", "GPU s", "swaps", "failed")
    for column in ("function", "class", "state", *right[:4], "resident on", *right[4:]):
        table.add_column(column, justify="right" if column in right else "left", no_wrap=column == "function")
    for entry in functions:
        share, latency = entry.share, entry.latency
        answered = entry.answered > 0
        state = Text(entry.state, style=_STATE_STYLE.get(entry.state, ""))
        if entry.reason:
            state.append(f": {entry.reason}", style="red")
        table.add_row(
            entry.key,
            _short(entry.cls),
            state,
            f"{share.sm_percent} %",
            f"{share.quota_percent:g} %",
            f"{share.limit_percent:g} %",
            format_bytes(entry.weight_bytes),
            ", ".join(entry.resident_on) or "host",
            str(entry.queued),
            f"{entry.rate:.1f}",
            *(f"{value:.1f}" if answered else "-" for value in (latency.p50_ms, latency.p95_ms, latency.p99_ms)),
            f"{entry.slo_ms:g}",
            f"{100 * entry.slo_met / entry.answered:.1f} %" if answered else "-",
            f"{entry.gpu_ns / S:.2f}",
            str(entry.swaps),
            str(entry.failed),
        )
    return table


def _short(cls: FunctionClass) -> str:
    return "LS" if cls is FunctionClass.LATENCY_SENSITIVE else "BE"
