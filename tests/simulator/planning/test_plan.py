"""Who shares, who keeps devices, and how many: on loads whose answer is known."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contracts.functions import FunctionClass
from contracts.units import GIB, MIB, S
from simulator.planning import report
from simulator.planning.capacity import Capacity, Job, Machine, Spells, Tally, play
from simulator.planning.demand import of_calls
from simulator.planning.plan import Plan, Running, make, running
from simulator.planning.wanted import LEVELS, Wanted
from tests.simulator.planning.functions import MACHINE, SPAN_NS, capacity, demand, function

MOST = 16


def planned(functions: Sequence[Wanted], per_s: Sequence[float], machine: Machine = MACHINE) -> tuple[Plan, Capacity]:
    found = capacity(functions, per_s, machine)
    return make(functions, found, {one.key: running(one, found) for one in functions}, MOST), found


def test_a_function_alone_at_90_percent_keeps_its_device() -> None:
    plan, _ = planned([function("busy", (60, 60), slo_ms=5000)], [15])

    assert [line.verdict for line in plan.lines] == ["keep dedicated"]
    assert dict(plan.devices) == {"low": 1, "mean": 1, "high": 1}
    assert plan.lines[0].busy > 0.8


def test_a_busy_function_keeps_its_device_and_the_others_share() -> None:
    # It fills 93 % of a device, the others 12 %: together that is two devices, and so it is apart.
    functions = [function("busy", (60, 60), slo_ms=3000), *(function(f"idle-{number}", slo_ms=500) for number in range(12))]
    plan, _ = planned(functions, [15.5, *[1.0] * 12])

    assert [line.verdict for line in plan.lines] == ["keep dedicated", *["share"] * 12]
    assert "fills" in plan.lines[0].reason
    assert (plan.devices["high"], plan.pool["high"], plan.now.most) == (2, 1, 13)


def test_a_hundred_idle_functions_fit_on_few_devices() -> None:
    # 100 x 200 MiB on devices of 4 GiB: a fifth of them fit at a time.
    functions = [function(f"idle-{number}") for number in range(100)]
    plan, _ = planned(functions, [0.1] * 100)

    assert {line.verdict for line in plan.lines} == {"share"}
    assert plan.devices["high"] <= 2
    assert all(line.tallies["high"].kept(line.wanted) for line in plan.lines)


def test_the_devices_hold_every_objective_and_one_fewer_do_not() -> None:
    functions = [function(f"f{number}", (120, 120), slo_ms=900) for number in range(10)]
    plan, found = planned(functions, [2.5] * 10)

    fewest = plan.pool["high"]
    assert {line.verdict for line in plan.lines} == {"share"}
    assert 3 <= fewest < 10
    assert found.holds(functions, fewest, "high")
    assert not found.holds(functions, fewest - 1, "high")
    # Judged anew, by nothing that was remembered.
    assert capacity(functions, [2.5] * 10).holds(functions, fewest, "high")


class Players:
    """Plays in this process, and notes the jobs that ended early."""

    def __init__(self) -> None:
        self.jobs = self.lost = 0

    def __call__(self, jobs: Iterable[Job]) -> Iterator[dict[str, Tally] | None]:
        for job in jobs:
            found = play(job)
            self.jobs += 1
            self.lost += found is None
            yield found


@settings(max_examples=4)
@given(slo_ms=st.sampled_from([60, 120, 300, 600]), rate=st.sampled_from([0.3, 1.0, 2.0]), best_effort=st.booleans(), seed=st.integers(0, 100))
def test_a_trial_that_ends_early_says_what_it_would_have_said_at_its_end(slo_ms: float, rate: float, best_effort: bool, seed: int) -> None:
    cls = FunctionClass.BEST_EFFORT if best_effort else FunctionClass.LATENCY_SENSITIVE
    functions = [function("x", slo_ms=slo_ms, cls=cls), *(function(f"f{number}", (10, 30), slo_ms, 900 * MIB) for number in range(7))]
    calls = demand(functions, [rate] * 8, seed, 2 * SPAN_NS)
    for devices in (1, 2):
        early, whole = (Capacity(calls, MACHINE, Spells(SPAN_NS, 2, 10 * S)) for _ in range(2))
        held = early.holds(functions, devices, "high")
        tallies = whole.tallies(functions, devices, "high")
        assert held is all(tallies[one.key].kept(one) for one in functions)
        assert {key: tally.late for key, tally in early.tallies(functions, devices, "high").items()} == {
            key: one.late for key, one in tallies.items()
        }


def test_what_is_lost_is_not_played_to_its_end_nor_again() -> None:
    functions = [function(f"f{number}", (120, 120), slo_ms=900) for number in range(10)]
    players = Players()
    found = Capacity(demand(functions, [2.5] * 10, span_ns=3 * SPAN_NS), MACHINE, Spells(SPAN_NS, 3, 0), players=players)
    assert not found.holds(functions, 1, "high")
    assert (players.jobs, players.lost) == (1, 1), "the first of three spells decides"
    assert not found.holds(functions, 1, "high")
    assert players.jobs == 1
    assert found.holds(functions, 8, "high")
    assert players.jobs == 4
    found.tallies(functions, 8, "high")
    assert players.jobs == 4, "a trial that holds was played to its end"
    assert found.tallies(functions, 1, "high")[functions[0].key].late > 0, "and one that is lost is, when that is asked for"
    assert players.jobs == 7


def test_misses_of_several_spells_together_end_a_trial() -> None:
    """One late request in each spell, where one in all is forgiven: no spell alone decides."""
    one = function("one", (50, 50), slo_ms=70, max_batch=1)
    times = np.array([5, 5.02, 65, 65.02, 125, 125.02]) * S
    players = Players()
    found = Capacity(of_calls([one.key], 3 * SPAN_NS, lambda _: [times.astype(np.int64)]), MACHINE, Spells(SPAN_NS, 3, 0), players=players)
    assert not found.holds([one], 1, "high")
    assert (players.jobs, players.lost) == (2, 0)
    assert found.tallies([one], 1, "high")[one.key].late == 3


@settings(max_examples=3)
@given(rate=st.sampled_from([2.0, 5.0, 8.0]), seed=st.integers(0, 100))
def test_twice_the_load_never_needs_fewer_devices(rate: float, seed: int) -> None:
    functions = [function(f"f{number}", (15, 15), slo_ms=100) for number in range(6)]
    spells = Spells(30 * S, 1)
    once, twice = (Capacity(demand(functions, [each] * 6, seed, 30 * S), MACHINE, spells) for each in (rate, 2 * rate))
    fewer, more = once.fewest(functions, "high", MOST), twice.fewest(functions, "high", MOST)

    assert fewer is not None
    assert more is None or fewer <= more


def test_slower_runs_need_no_fewer_devices() -> None:
    functions = [function(f"f{number}", (25, 75), slo_ms=450) for number in range(8)]
    plan, _ = planned(functions, [5] * 8)

    low, mean, high = (plan.devices[level] for level in LEVELS)
    assert low <= mean <= high
    assert low < high
    for line in plan.lines:
        assert line.percentile_ms("low") < line.percentile_ms("high")


def test_weights_that_may_never_go_stay_on_a_device() -> None:
    # 2 GiB take 180 ms over the link; the others, called more often, push them out.
    functions = [function("tight", (5, 5), slo_ms=60, weights=2 * GIB), *(function(f"f{number}", weights=500 * MIB) for number in range(12))]
    plan, _ = planned(functions, [0.2, *[1.5] * 12])

    tight, *others = plan.lines
    assert (tight.verdict, tight.devices) == ("keep dedicated", 1)
    assert "swap (179 ms)" in tight.reason
    assert {line.verdict for line in others} == {"share"}
    assert plan.devices["high"] == plan.pool["high"] + 1


def test_several_gpus_to_a_replica_are_not_shared() -> None:
    plan, _ = planned([function("wide", gpus=4, replicas=2), function("a"), function("b")], [1, 1, 1])

    assert [line.verdict for line in plan.lines] == ["keep dedicated", "share", "share"]
    assert "4 GPUs" in plan.lines[0].reason
    assert (plan.devices["high"], plan.now.most) == (9, 10)


CANNOT = {
    "slower than its objective": (function("x", (120, 150), slo_ms=100), "faster GPU"),
    "perhaps slower than its objective": (function("x", (60, 120), slo_ms=100), "more measurements"),
    "weights larger than a device": (function("x", weights=5 * GIB), "bigger GPU"),
}


@pytest.mark.parametrize(("one", "word"), CANNOT.values(), ids=CANNOT)
def test_what_no_device_can_serve_is_said_and_keeps_what_it_has(one: Wanted, word: str) -> None:
    plan, _ = planned([one, function("a"), function("b")], [1, 1, 1])

    assert plan.lines[0].verdict == "nothing will do"
    assert word in plan.lines[0].reason
    assert plan.devices["high"] == 1 + plan.pool["high"]


def test_shorter_batches_are_tried_where_long_ones_come_too_late() -> None:
    # Under load the batches fill, and eight rows take 240 ms.
    functions = [function("x", (30, 30), slo_ms=130), function("y")]
    plan, _ = planned(functions, [25, 0.1])

    assert plan.lines[0].wanted.function.max_batch < 8
    assert "batches of at most" in plan.lines[0].reason
    assert plan.lines[0].tallies["high"].kept(plan.lines[0].wanted)


def test_best_effort_work_may_be_late_but_not_lost() -> None:
    functions = [function("night", (50, 50), slo_ms=1, cls=FunctionClass.BEST_EFFORT), function("a"), function("b")]
    plan, _ = planned(functions, [3, 1, 1])

    night = plan.lines[0]
    assert (night.verdict, night.tallies["high"].unanswered) == ("share", 0)
    assert night.tallies["high"].late == night.tallies["high"].requests > 0


def test_a_function_that_is_never_called_takes_no_device() -> None:
    plan, _ = planned([function("a"), function("b"), function("never", replicas=0)], [1, 1, 0])

    never = plan.lines[2]
    assert (never.verdict, never.now) == ("share", Running(1, 0.0))
    assert "never called" in never.reason
    assert plan.devices["high"] == 1


def test_when_sharing_saves_nothing_it_says_so() -> None:
    functions = [function(name, (50, 50), slo_ms=500) for name in ("a", "b")]
    plan, _ = planned(functions, [14, 14])

    assert {line.verdict for line in plan.lines} == {"keep dedicated"}
    assert "sharing saves nothing here" in report.totals(plan, 2.5)[-1]


def test_money_is_what_the_devices_differ_by() -> None:
    functions = [function(f"f{number}", replicas=number % 2) for number in range(10)]
    plan, found = planned(functions, [0.02] * 10)
    saved = report.document(plan, found, 2.5, ())["saved_a_month"]["high"]

    # Those without replicas hold a GPU only while they are called, and 90 s longer.
    assert 5 < plan.now.mean < 10
    assert saved["gpu_hours"] == pytest.approx((plan.now.mean - 1) * 730)
    assert saved["dollars"] == pytest.approx(saved["gpu_hours"] * 2.5)


def test_several_nodes_and_seeds() -> None:
    functions = [function(f"f{number}", (80, 80), slo_ms=1200) for number in range(12)]
    calls = demand(functions, [5] * 12)
    one = Capacity(calls, Machine(4 * GIB, per_node=2), Spells(SPAN_NS, 1), seeds=2)
    fewest = one.fewest(functions, "high", MOST)

    assert fewest is not None
    assert fewest > 2
    assert sum(tally.requests for tally in one.tallies(functions, fewest, "high").values()) == sum(
        len(calls.calls(seed, function, 0, SPAN_NS)) for seed in range(2) for function in range(12)
    )
