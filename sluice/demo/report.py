"""What a demo measured, and whether it passed: figures per function, one verdict. Computes and shows; sends nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from contracts.status import FunctionStatus, NodeStatus
from contracts.units import MS, S
from sluice.demo.load import Target


class Checked(msgspec.Struct):
    """The checker's count for one function; `unchecked` answers shared a batch with a request whose answer is not here."""

    right: int = 0
    wrong: int = 0
    unchecked: int = 0
    detail: str = ""


class FunctionReport(msgspec.Struct, frozen=True):
    """One function. Latencies, rates and counts are of the load (without warm-up), the checked answers of all."""

    function: str
    rate: float
    sent: int
    answered: int
    refused: int
    failed: int
    p50_ms: float
    p95_ms: float
    p99_ms: float
    slo_ms: float
    slo_percentile: float
    slo_met_percent: float
    swaps: int
    gpu_s: float
    right: int
    wrong: int
    unchecked: int
    detail: str


class Report(msgspec.Struct, frozen=True):
    """A whole demo. `passed`: every accepted request was answered, and every answer was right."""

    seconds: float
    seed: int
    passed: bool
    verdict: str
    functions: tuple[FunctionReport, ...]


def make(targets: Sequence[Target], checked: dict[str, Checked], before: NodeStatus, after: NodeStatus, seconds: float, seed: int) -> Report:
    """The report of a load of `seconds`, `before` and `after` being the node's status at its two ends."""
    first = {entry.key: entry for entry in before.functions}
    last = {entry.key: entry for entry in after.functions}
    lines = tuple(
        _line(target, checked.get(target.function.key, Checked()), first.get(target.function.key), last.get(target.function.key), seconds)
        for target in targets
    )
    passed, verdict = _judge(lines)
    return Report(seconds, seed, passed, verdict, lines)


def percentile_ms(latencies_s: Sequence[float], percent: float) -> float:
    """The smallest latency that `percent` of them do not exceed (nearest rank), in ms; 0 of nothing."""
    if not latencies_s:
        return 0.0
    return 1000 * sorted(latencies_s)[max(0, math.ceil(percent / 100 * len(latencies_s)) - 1)]


def _line(target: Target, checked: Checked, before: FunctionStatus | None, after: FunctionStatus | None, seconds: float) -> FunctionReport:
    load = [reply for reply in target.replies if not reply.warm_up]
    latencies = [reply.latency_s for reply in load if reply.answered]
    slo = target.function.slo
    met = sum(latency * S <= slo.latency_ns for latency in latencies)
    errors = [reply.error for reply in target.replies if not reply.answered and not reply.refused]
    return FunctionReport(
        function=target.function.key,
        rate=len(latencies) / seconds,
        sent=len(load),
        answered=len(latencies),
        refused=sum(reply.refused for reply in load),
        failed=len(errors),
        p50_ms=percentile_ms(latencies, 50),
        p95_ms=percentile_ms(latencies, 95),
        p99_ms=percentile_ms(latencies, 99),
        slo_ms=slo.latency_ns / MS,
        slo_percentile=slo.percentile,
        slo_met_percent=100 * met / len(load) if load else 100.0,
        swaps=max(0, after.swaps - (before.swaps if before else 0)) if after else 0,
        gpu_s=max(0, after.gpu_ns - (before.gpu_ns if before else 0)) / S if after else 0.0,
        right=checked.right,
        wrong=checked.wrong,
        unchecked=checked.unchecked,
        detail=checked.detail or (errors[0] if errors else ""),
    )


def _judge(lines: Sequence[FunctionReport]) -> tuple[bool, str]:
    right, wrong, unchecked = (sum(getattr(line, name) for line in lines) for name in ("right", "wrong", "unchecked"))
    failed, refused, swaps = (sum(getattr(line, name) for line in lines) for name in ("failed", "refused", "swaps"))
    silent = [line.function for line in lines if not line.right]
    if wrong or unchecked or failed or silent:
        parts = [f"{wrong} answers wrong", f"{unchecked} not checkable", f"{failed} accepted requests without an answer"]
        none = f", no answer at all from {', '.join(silent)}" if silent else ""
        return False, f"FAILED: {', '.join(parts)}{none} ({right} right)"
    refusals = f", {refused} refused at once" if refused else ""
    return True, f"PASSED: {right} answers of {len(lines)} functions, each equal bit for bit to the unswapped model; {swaps} swaps{refusals}"


def render(report: Report) -> RenderableType:
    """The table, what went wrong, and the verdict."""
    table = Table(box=None, pad_edge=False, header_style="bold", title=f"{report.seconds:g} s of load, seed {report.seed}", title_justify="left")
    columns = ("rate/s", "sent", "p50 ms", "p95 ms", "p99 ms", "SLO ms", "SLO met", "refused", "swaps", "GPU s", "answers right")
    table.add_column("function", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right")
    for line in report.functions:
        met = Text(f"{line.slo_met_percent:.1f} %", style="" if line.slo_met_percent >= line.slo_percentile else "yellow")
        good = line.right == line.right + line.wrong + line.unchecked and not line.failed
        answers = Text(f"{line.right}/{line.right + line.wrong + line.unchecked + line.failed}", style="green" if good else "bold red")
        table.add_row(
            line.function,
            f"{line.rate:.1f}",
            str(line.sent),
            *(f"{value:.1f}" if line.answered else "-" for value in (line.p50_ms, line.p95_ms, line.p99_ms)),
            f"{line.slo_ms:g}",
            met,
            str(line.refused),
            str(line.swaps),
            f"{line.gpu_s:.2f}",
            answers,
        )
    details = [Text(f"{line.function}: {line.detail}", style="red") for line in report.functions if line.detail]
    return Group(table, *details, Text(f"\n{report.verdict}", style="bold green" if report.passed else "bold red"))
