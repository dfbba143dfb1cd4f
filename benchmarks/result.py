"""What a benchmark returns: named figures with their targets; printed as a table, written as JSON.

Every module here with `run(quick: bool) -> Result` is a benchmark. It measures ratios within one run where it can, for machines differ and are noisy.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import psutil
from rich.console import Console
from rich.table import Table

_VERSIONED = ("sluice", "torch", "numpy", "kserve", "msgspec")


@dataclass(frozen=True, slots=True)
class Metric:
    """One figure. `target` is None where nothing was promised; `better` says on which side of the target the good values lie."""

    value: float
    unit: str
    target: float | None = None
    better: Literal["higher", "lower"] = "lower"

    @property
    def met(self) -> bool:
        """Whether the target holds; True when there is none."""
        if self.target is None:
            return True
        return self.value >= self.target if self.better == "higher" else self.value <= self.target


@dataclass(frozen=True, slots=True)
class Result:
    """The figures of one run, and the seeds that made its inputs."""

    metrics: Mapping[str, Metric]
    seeds: tuple[int, ...] = field(default=())


def document(name: str, result: Result) -> dict[str, Any]:
    """The JSON form: benchmark, machine, versions, date, seeds, metrics."""
    return {
        "benchmark": name,
        "machine": machine(),
        "versions": versions(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seeds": list(result.seeds),
        "metrics": {
            key: {"value": metric.value, "unit": metric.unit, "target": metric.target, "better": metric.better}
            for key, metric in result.metrics.items()
        },
    }


def write(path: Path, name: str, result: Result) -> None:
    """Writes the JSON form, making the folder when it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document(name, result), indent=2) + "\n")


def show(name: str, result: Result, console: Console) -> None:
    """Prints the table; a missed target is marked, never hidden."""
    table = Table(title=name)
    table.add_column("metric")
    for column in ("value", "unit", "target"):
        table.add_column(column, justify="left" if column == "unit" else "right")
    for key, metric in result.metrics.items():
        sign = "≥" if metric.better == "higher" else "≤"
        target = "" if metric.target is None else f"{sign} {metric.target:,.4g}"
        table.add_row(key, f"{metric.value:,.4g}", metric.unit, target if metric.met else f"{target} missed", style=None if metric.met else "red")
    console.print(table)


def machine() -> dict[str, Any]:
    """The hardware that the figures were measured on; no host names."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": _gpus(),
        "kernel": platform.release(),
    }


def versions() -> dict[str, str]:
    """Python, the packages that matter, and the commit measured ("+" after it: with changes that are not committed)."""
    found = {"python": platform.python_version()}
    for package in _VERSIONED:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    commit = _output("git", "rev-parse", "--short=12", "HEAD")
    if commit:
        found["commit"] = commit + ("+" if _output("git", "status", "--porcelain") else "")
    return found


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _gpus() -> list[str]:
    return _output("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader").splitlines()


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False, timeout=30)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
