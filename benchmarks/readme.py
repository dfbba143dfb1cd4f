"""`python -m benchmarks.readme`: writes the figures of benchmarks/results/*.json into the README, so that no figure there is typed by hand."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
_TABLE = re.compile(
    r"<!-- figures of benchmarks/results/(\w+)\.json, written by `python -m benchmarks\.readme` -->\n.*?<!-- end of figures -->", re.DOTALL
)

_ROWS: Mapping[str, Mapping[str, str]] = {
    "node": {
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
    },
    "protocol": {
        "v2_binary_602k_speedup": "V2 binary, 602 KB: times faster than KServe's server",
        "v2_binary_602k_over_echo": "the same over a bare Starlette echo",
        "v2_json_602k_speedup": "V2 JSON, 602 KB: times faster",
        "v1_json_602k_speedup": "V1 JSON, 602 KB: times faster",
        "grpc_602k_speedup": "gRPC, 602 KB: times faster",
        "small_c16_throughput_ratio_v1": "requests a second at concurrency 16, 1x4, V1: over KServe's server",
        "small_c16_throughput_ratio_v2": "the same, V2 JSON",
        "small_c16_throughput_ratio_binary": "the same, V2 binary",
        "small_c16_throughput_ratio_grpc": "the same, gRPC",
        "small_c1_added_ms_v1": "p50 at concurrency 1, 1x4, V1: more than KServe's server, which crosses no process",
        "small_c1_added_ms_v2": "the same, V2 JSON",
        "small_c1_added_ms_binary": "the same, V2 binary",
        "small_c1_added_ms_grpc": "the same, gRPC",
        "soak_wrong": "wrong answers among 10,000 over all protocols, while functions load, unload and change shares",
        "soak_lost": "lost requests among them",
        "growth_mib_predictor": "memory that 100,000 requests leave in the predictor",
        "growth_mib_agent": "the same in the agent",
        "growth_mib_lane": "the same in a lane",
    },
    "estimator": {
        "unseen_configurations_estimator_mape_percent": "V100, unseen configurations (10 %): mean absolute error",
        "unseen_configurations_boosted_tree_mape_percent": "the same with a boosted tree, which may say that more is slower",
        "unseen_models_estimator_16_mape_percent": "V100, unseen models, 16 probes",
        "unseen_models_estimator_29_mape_percent": "V100, unseen models, 29 probes",
        "unseen_models_formula_29_mape_percent": "the same with the formula without learning, 29 probes",
        "unseen_models_estimator_16_coverage_percent": "measurements inside the 90 % interval, unseen models, 16 probes",
        "unseen_models_estimator_16_non_monotone": "predictions that are slower with a larger share",
        "fit_s": "fitting all of the V100 data",
        "predict_800_ms": "800 configurations of a model",
        "cpu_held_out_mape": "CPU device, three real models, shares that were not probed: mean absolute error",
        "cpu_held_out_coverage": "measurements of those inside the 90 % interval",
        "live_p99_over_slo": "p99 of 60 s of live load at the share that `need` recommends, over the objective",
        "live_kept": "requests of that load in time",
    },
    "simulator": {
        "requests_per_s": "simulated requests a second, one core, 1,000 functions on 24 GPUs",
        "cost_exponent": "exponent of the cost of a world, 100 to 10,000 functions (n log n would be 1.15)",
        "memory_mb": "memory for 800,000 requests",
        "fidelity_p50_error": "simulated against a real run of six functions on the CPU device: p50",
        "fidelity_p99_error": "the same, p99",
        "fidelity_gpu_seconds_error": "the same, GPU seconds",
        "functions_on_4_devices_98_percent_sluice": "functions on 4 linked GPUs of 32 GiB, 98 % of them within their objectives: Sluice",
        "functions_on_4_devices_98_percent_torpor": "the same, Torpor",
        "functions_on_4_devices_98_percent_keep_alive": "the same, keeping whole models alive",
        "functions_on_4_devices_98_percent_has_gpu": "the same, HAS-GPU",
        "functions_on_4_devices_98_percent_fast_gshare": "the same, FaST-GShare",
        "functions_on_4_devices_98_percent_dedicated": "the same, a GPU for each",
        "functions_on_4_small_devices_98_percent_sluice": "functions on 4 linked GPUs of 8 GiB, several times their memory: Sluice",
        "functions_on_4_small_devices_98_percent_torpor": "the same, Torpor",
        "functions_kept_of_1000_on_6_nodes_sluice": "of 1,000 functions on 6 nodes of four 32 GiB GPUs, within their objectives: Sluice",
        "functions_kept_of_1000_on_6_nodes_torpor": "the same, Torpor",
        "lalb_slow_loads_above_times_faster": "loads of 2.4 to 4 s, just above saturation: mean latency of load balancing over LALB with overtaking",
        "lalb_fast_swaps_above_times_faster": "the same with swaps of 5 to 30 ms",
    },
}


def table(name: str, document: Mapping[str, Any]) -> str:
    """The Markdown table of one benchmark; a missed target says so, and one that nobody set is left out."""
    lines = ["| figure | measured | target |", "|---|---|---|"]
    for metric_name, words in _ROWS[name].items():
        metric = document["metrics"][metric_name]
        value, unit = metric["value"], metric["unit"]
        lines.append(f"| {words} | {_number(value)} {unit} | {_target(value, metric['target'], metric['better'])} |")
    machine = document["machine"]
    lines.append("")
    lines.append(f"{machine['cpu']}, {machine['cores']} cores, {document['date'][:10]}.")
    return "\n".join(lines)


def _target(value: float, target: float | None, better: str) -> str:
    if target is None:
        return ""
    sign, met = ("≥", value >= target) if better == "higher" else ("≤", value <= target)
    return f"{sign} {_number(target)}{'' if met else ', missed'}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 or value == int(value) else f"{value:.3g}"


def rendered(readme: str) -> str:
    """The README's text with the figures as they were measured."""

    def fill(found: re.Match[str]) -> str:
        name = found[1]
        head = found[0].split("\n", 1)[0]
        return f"{head}\n\n{table(name, json.loads((RESULTS / f'{name}.json').read_text()))}\n\n<!-- end of figures -->"

    return _TABLE.sub(fill, readme)


def main() -> None:
    """Rewrites README.md in place."""
    path = ROOT / "README.md"
    path.write_text(rendered(path.read_text()))


if __name__ == "__main__":
    main()
