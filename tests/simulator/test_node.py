"""The simulated world: what is simulated agrees with queueing theory and with simple sums, and every request has one outcome."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contracts.functions import Function, FunctionClass, ModelFormat, ModelRef, Share, Slo
from contracts.units import GIB, MIB, MS, S
from nodeagent.events import FunctionDeclared, FunctionSpec
from nodeagent.settings import DeviceSpec
from simulator.arrivals import Arrivals, of_many, of_one
from simulator.engine import Engine
from simulator.front import Fronts
from simulator.generators import poisson
from simulator.node import Hardware, SimulatedNode
from simulator.record import Histogram, Record

START = 10 * S


class Fixed:
    """A batch takes its rows' time on all SMs, and inversely more on fewer."""

    def __init__(self, row_ns: int = 10 * MS) -> None:
        self.row_ns = row_ns

    def run_ns(self, function: str, rows: int, sm_percent: int) -> int:
        return self.row_ns * rows * 100 // sm_percent


class World:
    """Functions f0, f1, ... on one node."""

    def __init__(
        self,
        *classes: FunctionClass,
        devices: int = 1,
        weight_bytes: int = 100 * MIB,
        capacity: int = GIB,
        max_batch: int = 1,
        run: Fixed | None = None,
        sm: int = 100,
        link: str = "",
        **hardware: float,
    ) -> None:
        self.engine = Engine()
        specs = [DeviceSpec(f"gpu:{n}", capacity, 10_000_000_000, link) for n in range(devices)]
        self.node = SimulatedNode(self.engine, specs, run or Fixed(), Hardware(**hardware))  # type: ignore[arg-type]
        self.functions = [
            Function(
                f"f{n}", ModelRef(ModelFormat.CATALOG, "none"), cls=cls, share=Share(sm, 9000 // len(classes)), slo=Slo(100 * MS), max_batch=max_batch
            )
            for n, cls in enumerate(classes)
        ]
        self.fronts = Fronts(self.engine, self.functions, [self.node] * len(classes))
        for function in self.functions:
            spec = FunctionSpec(function.key, function.cls, function.share, function.slo, weight_bytes, 10 * MS)
            self.node.handle(FunctionDeclared(spec))
        self.engine.settle(START)

    def play(self, arrivals: Arrivals) -> list[Record]:
        shifted = Arrivals(arrivals.names, arrivals.at_ns + START, arrivals.function, arrivals.span_ns + START)
        self.engine.run(shifted, self.fronts.arrive)
        return list(self.fronts.records.values())


LS, BE = FunctionClass


def at(*times_ms: float) -> Arrivals:
    return of_one("f0", np.array([int(time * MS) for time in times_ms], np.int64), 1000 * S)


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_waiting_is_that_of_an_m_d_1_queue(load: float) -> None:
    """Pollaczek and Khinchine: the mean wait is load x service / 2 (1 - load)."""
    (record,) = World(LS).play(of_one("f0", poisson(load * 100, 300 * S, np.random.default_rng(1)), 300 * S))
    assert record.parts["queue"].mean_ms == pytest.approx(load * 10 / (2 * (1 - load)), rel=0.15)


def test_a_cold_request_runs_while_its_weights_arrive() -> None:
    """100 MiB at 10 GB/s take 10.5 ms, of which a run of 10 ms hides all but its tail; the next one is warm."""
    (record,) = World(LS, tail=0.1).play(at(0, 100))
    assert (record.answered, record.cold) == (2, 1)
    assert record.parts["total"].most_ns == pytest.approx((10.486 + 1 + 0.05) * MS, rel=0.01)
    assert record.parts["swap"].most_ns == pytest.approx((10.486 + 1 + 0.05 - 10) * MS, rel=0.01)


def test_a_run_longer_than_its_copy_pays_nothing_for_it() -> None:
    (record,) = World(LS, run=Fixed(50 * MS)).play(at(0))
    assert record.parts["total"].most_ns == 50 * MS
    assert record.cold == 1


def test_between_two_batches_a_lane_stands_still_and_nobody_pays() -> None:
    world = World(LS, LS, handover_ns=MS)
    records = world.play(of_many(("f0", "f1"), [np.array([S, 2 * S]), np.array([S, 2 * S])], 10 * S))
    assert max(record.parts["total"].most_ns for record in records) >= 22 * MS
    assert sorted(int(record.parts["total"].curve()[0][0]) for record in records) == [11, 22], "when both are warm"
    assert world.node.state.used_ns == 4 * 10 * MS


def test_computing_beside_its_own_copy_takes_longer() -> None:
    cold, warm = (World(LS, run=Fixed(50 * MS), cold_slowdown=1.2).play(at(*times))[0].parts["run"] for times in ((0,), (0, 200)))
    assert cold.most_ns == 60 * MS
    assert warm.sum_ns == (60 + 50) * MS


def test_a_lane_of_half_the_sms_takes_twice_as_long_and_two_run_at_once() -> None:
    """The second lane of a size comes when it is first missed."""
    first, second = World(LS, LS, sm=50).play(of_many(("f0", "f1"), [np.array([0, S]), np.array([0, S])], 10 * S))
    assert first.parts["run"].most_ns == second.parts["run"].most_ns == 20 * MS
    assert first.parts["queue"].sum_ns + second.parts["queue"].sum_ns <= 20 * MS, "only the first time one waited for the other"


def test_neighbours_slow_each_other_down() -> None:
    records = World(LS, LS, sm=50, neighbour_slowdown=0.5).play(of_many(("f0", "f1"), [np.array([0, S]), np.array([0, S])], 10 * S))
    assert max(record.parts["run"].most_ns for record in records) == 25 * MS


def test_best_effort_work_gives_way_within_a_segment() -> None:
    ls, be = World(LS, BE, run=Fixed(100 * MS), segment_ns=2 * MS).play(of_many(("f0", "f1"), [np.array([S]), np.array([S - 50 * MS])], 10 * S))
    assert ls.parts["queue"].most_ns <= 2 * MS
    assert be.parts["run"].most_ns == 100 * MS
    assert be.parts["total"].most_ns == pytest.approx(202 * MS, abs=2 * MS)


def test_requests_that_wait_together_run_together() -> None:
    (record,) = World(LS, max_batch=8).play(at(*[0] * 17))
    assert record.answered == 17
    assert record.parts["total"].percentile_ms(100) == pytest.approx(10 + 80 + 80 + 2, abs=3)


def test_a_function_that_cannot_keep_up_is_refused_and_not_queued_for_ever() -> None:
    (record,) = World(LS).play(of_one("f0", poisson(300, 100 * S, np.random.default_rng(2)), 100 * S))
    assert record.requests == record.answered + record.rejected.total()
    assert record.rejected.total() > 0.5 * record.requests
    assert record.parts["total"].most_ns < 31 * S
    assert not record.within_slo(98)


def test_devices_on_one_link_share_it() -> None:
    def slowest_ms(link: str) -> float:
        world = World(LS, LS, devices=2, weight_bytes=500 * MIB, link=link)
        records = world.play(of_many(("f0", "f1"), [np.array([S]), np.array([S])], 10 * S))
        return max(record.parts["total"].most_ns for record in records) / MS

    assert slowest_ms("") == pytest.approx(53.5, rel=0.03)
    assert slowest_ms("switch") == pytest.approx(106, rel=0.03)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1 << 30), st.integers(1, 3), st.sampled_from([1, 4]))
def test_every_request_has_one_outcome_and_every_run_the_same_result(seed: int, devices: int, max_batch: int) -> None:
    """More functions than fit, both classes, near the capacity; invariants of the state hold at the end, and the same seed gives the same world."""

    def play() -> list[tuple[object, ...]]:
        chance = np.random.default_rng(seed)
        world = World(LS, BE, LS, BE, LS, devices=devices, weight_bytes=400 * MIB, max_batch=max_batch, neighbour_slowdown=0.2)
        rates = chance.uniform(1, 30 * devices, 5)
        arrivals = of_many([f"f{n}" for n in range(5)], [poisson(rate, 2 * S, chance) for rate in rates], 2 * S)
        records = world.play(arrivals)
        world.node.state.check()
        assert [record.requests for record in records] == np.bincount(arrivals.function, minlength=5).tolist()
        assert not world.node.state.requests
        gpu_ns = sum(function.account.charged_ns for function in world.node.state.functions.values())
        assert gpu_ns == world.node.state.used_ns
        return [(record.answered, record.cold, record.late, record.parts["total"].sum_ns, dict(record.rejected)) for record in records]

    assert play() == play()


@given(st.lists(st.integers(0, 10**12), min_size=1, max_size=300), st.floats(0.1, 100))
def test_percentiles_are_within_half_a_percent(times: list[int], percent: float) -> None:
    histogram = Histogram()
    for some in (times[:7], times[7:]):
        histogram.add(np.array(some, np.int64))
    exact = sorted(times)[int(np.ceil(len(times) * percent / 100)) - 1]
    assert histogram.percentile_ms(percent) * MS == pytest.approx(exact, rel=0.006, abs=1)
    assert histogram.mean_ms * MS == pytest.approx(sum(times) / len(times))
    assert histogram.count == len(times)
