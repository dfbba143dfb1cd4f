"""The report that people look at: plots as PNG, and one HTML page that holds plots, table and all numbers and needs nothing beside it."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from simulator.report import SHOWN, Curves, mean
from simulator.scenario import Scenario

mpl.use("Agg")
_SHOWN_BEYOND = 100
"""Times that are longer than this many objectives are not drawn: a queue without end would squeeze all others."""
_STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:75rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:1rem 0}td,th{padding:.3rem .7rem;border-bottom:1px solid #ddd;text-align:right}
td:first-child,th:first-child{text-align:left}img{max-width:100%}details{margin:1rem 0}pre{overflow:auto;background:#f6f6f6;padding:1rem}"""


def write(folder: Path, scenario: Scenario, figures: Mapping[str, Sequence[dict[str, float]]], curves: Curves, found: Mapping[str, Any]) -> None:
    """latency.png, cost.png and index.html in a folder that is there."""
    pictures = {"latency.png": _latency(scenario, curves), "cost.png": _cost(figures)}
    for name, picture in pictures.items():
        (folder / name).write_bytes(picture)
    (folder / "index.html").write_text(_page(scenario, figures, pictures, found), "utf-8")


def _latency(scenario: Scenario, curves: Curves) -> bytes:
    """How many percent of the requests were answered within which time."""
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for policy, points in curves.items():
        axes.step([ms for ms, _ in points], [percent for _, percent in points], where="post", label=policy)
    objectives = sorted({group.slo_ms for group in scenario.functions})
    for objective in objectives:
        axes.axvline(objective, color="grey", linestyle=":", linewidth=1)
        axes.annotate(f" SLO {objective:g} ms", (objective, 50), color="grey", fontsize=8, rotation=90, ha="right", va="center")
    axes.set(xscale="log", xlabel="latency (ms)", ylabel="requests answered (%)", ylim=(0, 101), title=scenario.name)
    axes.set_xlim(right=objectives[-1] * _SHOWN_BEYOND)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right center", fontsize=8)
    return _png(figure)


def _cost(figures: Mapping[str, Sequence[dict[str, float]]]) -> bytes:
    """What was reserved and what of it was used, beside the functions that kept their objective."""
    policies = list(figures)
    means = [mean(runs) for runs in figures.values()]
    figure = Figure(figsize=(9, 0.5 * len(policies) + 1.6), layout="constrained")
    cost, kept = figure.subplots(1, 2, sharey=True)
    cost.barh(policies, [one["gpu_seconds_reserved"] for one in means], color="#c8d5e6", label="reserved")
    cost.barh(policies, [min(one["gpu_seconds_busy"], one["gpu_seconds_reserved"]) for one in means], color="#3b6ea5", label="busy")
    cost.set(xlabel="GPU seconds")
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    cost.invert_yaxis()
    kept.barh(policies, [100 * one["functions_in_slo"] / one["functions"] for one in means], color="#4c9f70")
    kept.set(xlabel="functions within their SLO (%)", xlim=(0, 100))
    return _png(figure)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def _page(scenario: Scenario, figures: Mapping[str, Sequence[dict[str, float]]], pictures: Mapping[str, bytes], found: Mapping[str, Any]) -> str:
    head = "".join(f"<th>{html.escape(policy)}</th>" for policy in figures)
    means = [mean(runs) for runs in figures.values()]
    rows = [
        "".join((f"<tr><td>{name}</td>", *(f"<td>{form.format(one[key])}</td>" for one in means), "</tr>")) for key, (name, form) in SHOWN.items()
    ]
    shown = "".join(
        f'<p><img alt="{name}" src="data:image/png;base64,{base64.b64encode(picture).decode()}"></p>' for name, picture in pictures.items()
    )
    title = html.escape(scenario.name)
    numbers = html.escape(json.dumps(found, indent=1))
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style><h1>{title}</h1>'
        f"<p>{scenario.devices.total} GPUs, {scenario.span_s:g} s, {sum(group.count for group in scenario.functions)} functions, open loop; "
        f"the same arrivals for all policies. Reserved idle time is charged.</p>"
        f"<table><tr><th></th>{head}</tr>{''.join(rows)}</table>{shown}"
        f"<details><summary>All numbers</summary><pre>{numbers}</pre></details></html>"
    )
