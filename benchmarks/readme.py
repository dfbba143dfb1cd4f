"""`python -m benchmarks.readme`: writes the figures of benchmarks/results/node.json into the README, so that no figure there is typed by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks" / "results" / "node.json"
_BEGIN, _END = "<!-- figures of", "<!-- end of figures -->"

_ROWS = {
    "wrong_answers": "wrong answers among 10,000, of 200 functions on a device that holds 20",
    "share_error_points": "error of the shares of two saturating functions, quota 30 and 60",
    "share_error_long_batches_points": "the same with batches longer than the window",
    "limit_40_percent": "time used by a saturating function with limit 40",
    "busy_when_borrowing_percent": "device time in use when one function borrows what another leaves",
    "share_change_windows": "windows of 100 ms until a changed share acts",
    "share_change_lost_requests": "requests lost by changing shares",
    "preemption_p99_ratio": "p99 with a best-effort neighbour over p99 alone",
    "added_latency_p50_ms": "predictor, agent and lane on top of the model's own time, p50",
    "copy_ratio": "speed of a swap over a plain memcpy",
    "cold_ratio_vision": "cold answer over max(copy, run), ViT-B of 343 MB, which runs longer than it copies",
    "cold_ratio_network": "the same, perceptron of 337 MB, which copies longer than it runs",
    "cold_ratio_text": "the same, BERT-base at 128 tokens, which cannot begin before its 94 MB of word vectors are there",
    "scheduler_events_per_s": "scheduler events a second, 1,000 functions on 8 devices",
}


def table(document: dict[str, Any]) -> str:
    """The Markdown table; a missed target says so."""
    lines = ["| figure | measured | target |", "|---|---|---|"]
    for name, words in _ROWS.items():
        metric = document["metrics"][name]
        value, target, unit = metric["value"], metric["target"], metric["unit"]
        sign, met = ("≥", value >= target) if metric["better"] == "higher" else ("≤", value <= target)
        lines.append(f"| {words} | {_number(value)} {unit} | {sign} {_number(target)}{'' if met else ', missed'} |")
    machine = document["machine"]
    lines.append("")
    lines.append(f"{machine['cpu']}, {machine['cores']} cores, {document['date'][:10]}.")
    return "\n".join(lines)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 or value == int(value) else f"{value:.3g}"


def rendered(readme: str, document: dict[str, Any]) -> str:
    """The README's text with the figures of this document."""
    head, rest = readme.split(_BEGIN, 1)
    comment, rest = rest.split("\n", 1)
    return f"{head}{_BEGIN}{comment}\n\n{table(document)}\n\n{_END}{rest.split(_END, 1)[1]}"


def main() -> None:
    """Rewrites README.md in place."""
    path = ROOT / "README.md"
    path.write_text(rendered(path.read_text(), json.loads(RESULT.read_text())))


if __name__ == "__main__":
    main()
