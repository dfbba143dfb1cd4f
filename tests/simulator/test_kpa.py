"""The KPA against what Knative's own code decided and averaged for the same input."""

import gzip
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulator.baselines.kpa import Decision, Kpa, Spec, WindowAverage, scraped_pods

DATA = Path(os.environ.get("SLUICE_DATA", Path(__file__).parents[3] / "shared" / "data")) / "kpa-golden"
recorded = pytest.mark.skipif(not DATA.is_dir(), reason="the recorded decisions of Knative are not here (SLUICE_DATA)")


def lines(name: str) -> Iterator[dict[str, Any]]:
    with gzip.open(DATA / name, "rt") as file:
        yield from map(json.loads, file)


@recorded
def test_every_recorded_decision() -> None:
    decisions = 0
    for sequence in lines("decisions.jsonl.gz"):
        kpa = Kpa(Spec(**sequence["spec"]), sequence["start_ready"])
        for number, step in enumerate(sequence["steps"]):
            if step["stable"] is None:
                assert not step["valid"]
                continue
            decided = kpa.decide(step["stable"], step["panic"], step["ready"], step["t_s"], reachable=step["reachable"])
            assert decided == Decision(step["desired"], step["ebc"]), (sequence["spec"], number, step)
            decisions += 1
    assert decisions > 14_000


@recorded
def test_every_recorded_window_average() -> None:
    averages = 0
    for sequence in lines("window-averages.jsonl.gz"):
        window = WindowAverage(sequence["window_s"])
        for event in sequence["events"]:
            if "record" in event:
                window.record(event["t_s"], event["record"])
            else:
                assert window.average(event["t_s"]) == pytest.approx(event["window_average"], abs=1e-9), event
                averages += 1
    assert averages > 2_000


def test_panic_scales_up_at_once_and_not_down_for_a_stable_window() -> None:
    kpa = Kpa(Spec(target=1, total=1), ready=1)
    assert kpa.decide(stable=1, panic=4, ready=1, now_s=0).pods == 4
    assert kpa.decide(stable=1, panic=0, ready=4, now_s=60).pods == 4
    assert kpa.decide(stable=1, panic=0, ready=4, now_s=62).pods == 2, "halved at most"


@given(st.lists(st.tuples(st.integers(0, 5), st.floats(0, 100)), min_size=1, max_size=50), st.integers(1, 20))
def test_the_window_average_is_the_mean_of_its_seconds(steps: list[tuple[int, float]], size: int) -> None:
    window, seconds, now = WindowAverage(size), {0: 0.0}, 0
    window.record(0, 0.0)
    first = 0
    for gap, value in steps:
        if gap >= size:
            first = now + gap
            seconds.clear()
        now += gap
        seconds[now] = seconds.get(now, 0.0) + value
        window.record(now, value)
    since = max(first, now - size + 1)
    assert window.average(now) == pytest.approx(sum(v for s, v in seconds.items() if s >= since) / (now - since + 1), abs=2e-6)


def test_a_few_pods_are_all_asked_and_many_are_sampled() -> None:
    assert [scraped_pods(ready) for ready in (0, 3, 4, 100, 10_000)] == [0, 3, 4, 14, 16]
