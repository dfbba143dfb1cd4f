"""What the policies are worth: the effect of locality that GPU-enabled FaaS reports, and how many functions keep their objective on the same devices.

Every policy meets the same functions, seeds and arrivals. A number of functions counts as kept when it is for every seed.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import numpy as np

from benchmarks.result import Metric
from simulator.record import together
from simulator.run import simulate
from simulator.scenario import Scenario, build, load

SEED = 1
_SCENARIOS = Path(__file__).parents[1] / "scenarios"
_SEEDS = (0, 1, 2)
_LOADS = {"below": 0.7, "above": 1.0, "far_above": 4.0}
"""Parts of the scenario's rate; load balancing is saturated at about 0.9 of it."""
_POLICIES = ("sluice", "torpor", "lalb-o3", "load-balancing", "keep-alive", "fast-gshare", "has-gpu", "knative")
_SWAPPING = ("sluice", "torpor")
_QUICK = {"span_s": 60.0, "warm_up_s": 10.0}
_NODES, _WANTED = 6, 1000
_PRESSED_S = 120.0
"""Shorter than the rest: every swap is hundreds of events."""
_SCOUTED_S = 30.0
_HOPELESS = 0.1
"""The part of late requests in a short run beyond which a whole one is not worth its time."""
_PRECISION = 0.04


def measure(quick: bool) -> dict[str, Metric]:
    """All figures of this part."""
    return _locality(quick) | _devices(quick) | _pressure(quick) | _nodes(quick)


# Locality.


def _locality(quick: bool) -> dict[str, Metric]:
    """How many times load balancing's mean latency is that of LALB with out-of-order dispatch, and that of LALB beside it."""
    seeds = _SEEDS[:1] if quick else _SEEDS
    found = {}
    for name in ("lalb-slow-loads", "lalb-fast-swaps"):
        scenario = load(_SCENARIOS / f"{name}.yaml")
        for part, rate in _LOADS.items():
            balanced, local, reordered = (_mean_ms(scenario, policy, rate, seeds) for policy in ("load-balancing", "lalb", "lalb-o3"))
            key = f"{name}_{part}".replace("-", "_")
            promised = name == "lalb-slow-loads" and part == "above"
            found[f"{key}_times_faster"] = Metric(balanced / reordered, "times the mean latency", 20 if promised else None, "higher")
            found[f"{key}_by_reordering"] = Metric(local / reordered, "times the mean latency")
    return found


def _mean_ms(scenario: Scenario, policy: str, rate: float, seeds: Sequence[int]) -> float:
    return statistics.fmean(_mean_of(scenario, policy, rate, seed) for seed in seeds)


def _mean_of(scenario: Scenario, policy: str, rate: float, seed: int) -> float:
    world = build(scenario, seed)
    slower = dataclasses.replace(world, arrivals=world.arrivals.at_rate(rate, np.random.default_rng((SEED, seed))))
    return together(simulate(policy, slower).records.values())["total"].mean_ms


# Functions on devices.


class Kept:
    """Which part of so many functions keeps its objective under a policy. `count` is dealt out to the scenario's groups in equal parts."""

    def __init__(self, scenario: Scenario, policy: str, seeds: Sequence[int]) -> None:
        self._scenario = scenario
        self._policy = policy
        self._seeds = seeds
        self._known: dict[tuple[int, int], float] = {}

    def largest(self, part: float, least: int, most: int) -> int:
        """The greatest number of functions of which this part is kept, to within a few percent; 0 if not even `least` are."""
        return largest(lambda count: all(self._part(count, seed) >= part for seed in self._seeds), least, most)

    def holds(self, count: int, part: float) -> float:
        """The least part over the seeds, whether or not it is the part that is wanted; stops at the first seed that misses it."""
        lowest = 1.0
        for seed in self._seeds:
            lowest = min(lowest, self._part(count, seed))
            if lowest < part:
                break
        return lowest

    def _part(self, count: int, seed: int) -> float:
        if (count, seed) not in self._known:
            self._known[count, seed] = 0.0 if self._hopeless(count, seed) else self._play(count, seed)
        return self._known[count, seed]

    def _play(self, count: int, seed: int) -> float:
        world = build(with_functions(self._scenario, count), seed)
        records = simulate(self._policy, world).records
        return sum(records[function.key].within_slo(function.slo.percentile) for function in world.functions) / count

    def _hopeless(self, count: int, seed: int) -> bool:
        """An overload shows within half a minute."""
        short = msgspec.structs.replace(with_functions(self._scenario, count), span_s=_SCOUTED_S)
        records = simulate(self._policy, build(short, seed)).records.values()
        return sum(record.late for record in records) > _HOPELESS * sum(record.requests for record in records)


def with_functions(scenario: Scenario, count: int) -> Scenario:
    """The scenario with so many functions, at least one of each group."""
    groups = scenario.functions
    counts = [(count + at) // len(groups) for at in range(len(groups))]
    return msgspec.structs.replace(
        scenario, functions=[msgspec.structs.replace(group, count=number) for group, number in zip(groups, counts, strict=True)]
    )


def largest(holds: Callable[[int], bool], least: int, most: int) -> int:
    """The greatest number that holds, to within _PRECISION: doubled until it does not, then bisected. 0 if `least` does not, `most` if all do."""
    low, high = 0, least
    while holds(high):
        low = high
        if low == most:
            return most
        high = min(most, 2 * high)
    while high - low > max(1, _PRECISION * low) and low:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def _scenario(quick: bool) -> Scenario:
    scenario = load(_SCENARIOS / "functions-per-device.yaml")
    return msgspec.structs.replace(scenario, **_QUICK) if quick else scenario


def _devices(quick: bool) -> dict[str, Metric]:
    """On four devices of 32 GiB: every policy."""
    return _compared(_scenario(quick), "on_4_devices", _SWAPPING if quick else _POLICIES, quick)


def _pressure(quick: bool) -> dict[str, Metric]:
    """On devices of a quarter of that memory with a fast link each: the weights of what is served are several times what they hold."""
    if quick:
        return {}
    scenario = _scenario(quick)
    scarce = msgspec.structs.replace(scenario.devices, memory="8Gi", link_gb_per_s=25.0, per_link=1)
    shorter = msgspec.structs.replace(scenario, devices=scarce, span_s=_PRESSED_S)
    return _compared(shorter, "on_4_small_devices", (*_SWAPPING, "lalb-o3", "keep-alive"), quick)


def _compared(scenario: Scenario, where: str, policies: Sequence[str], quick: bool) -> dict[str, Metric]:
    """The number of functions that are all kept, and the number of which 98 % are; ours should be the greatest."""
    groups, devices = len(scenario.functions), scenario.devices.total
    found: dict[str, dict[str, int]] = {"all": {}, "98_percent": {}}
    for policy in policies:
        kept = Kept(scenario, policy, _SEEDS[:1] if quick else _SEEDS)
        for name, part in (("all", 1.0), ("98_percent", 0.98)):
            found[name][policy] = kept.largest(part, max(groups, found["all"].get(policy, 0)), 200 * devices)
    metrics = {}
    for name, numbers in found.items():
        numbers["dedicated"] = devices  # a whole device each
        best = max(number for policy, number in numbers.items() if policy != "sluice")
        for policy, number in numbers.items():
            target = best if policy == "sluice" else None
            metrics[f"functions_{where}_{name}_{policy}".replace("-", "_")] = Metric(number, "functions", target, "higher")
    return metrics


def _nodes(quick: bool) -> dict[str, Metric]:
    """On six nodes: how many of 1,000 functions and more are kept."""
    if quick:
        return {}
    scenario = _scenario(quick)
    large = msgspec.structs.replace(scenario, devices=msgspec.structs.replace(scenario.devices, nodes=_NODES))
    return {
        f"functions_kept_of_{_WANTED}_on_{_NODES}_nodes_{policy}": Metric(
            100 * Kept(large, policy, _SEEDS).holds(_WANTED, 1.0), "%", 100 if policy == "sluice" else None, "higher"
        )
        for policy in _SWAPPING
    }
