"""GPUs shared by rectangles: tokens are never overspent, weights are held as often as they must be, and what is reserved is charged."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from contracts.units import GIB, MS, S
from simulator.arrivals import Arrivals, of_one
from simulator.engine import Engine
from simulator.generators import poisson
from simulator.pool import TIMED_OUT, Model
from simulator.shared_gpu import WINDOW_NS, Pod, SharedGpus, Size, Tokens


class Fixed:
    """10 ms a row on all SMs, inversely more on fewer."""

    def run_ns(self, function: str, rows: int, sm_percent: int) -> int:
        return 10 * MS * rows * 100 // sm_percent


class Planned:
    """A scaler that adds these pods at these seconds, and ends all at another."""

    def __init__(self, *plan: tuple[int, Size], end_s: int = -1, gpu: int = 0) -> None:
        self.plan = list(plan)
        self.end_s = end_s
        self.gpu = gpu
        self.gone: list[Pod] = []

    def scale(self, gpus: SharedGpus, function: int, per_s: float) -> None:
        now_s = gpus.now_ns // S
        for at_s, size in self.plan:
            if at_s == now_s:
                gpus.add(function, self.gpu, size, None)
        if now_s == self.end_s:
            for pod in list(gpus.pods[function]):
                gpus.end(pod)

    def left(self, pod: Pod) -> None:
        self.gone.append(pod)


def play(scaler: Any, at_ms: list[float], span_s: int = 60, models: int = 1, **changed: Any) -> SharedGpus:
    engine = Engine()
    model = {"run_ns": 10 * MS, "weight_bytes": GIB, "load_ns": 0, "objective_ns": 100 * MS, **changed}
    settings = {"pod_start_ns": 5 * S, "sharing": False, **{key: model.pop(key) for key in ("sharing",) if key in model}}
    gpus = SharedGpus(engine, [Model(f"m{n}", **model) for n in range(models)], Fixed(), [4 * GIB], scaler, **settings)
    gpus.start()
    engine.at(span_s * S, gpus.stop)
    at_ns = np.array([int(at * MS) for at in at_ms], np.int64)
    engine.run(of_one("m0", at_ns, span_s * S), gpus.arrive)
    return gpus


@given(st.integers(1, 100), st.lists(st.tuples(st.integers(0, 90 * MS), st.integers(1, 130 * MS)), max_size=12))
def test_no_window_gives_more_than_its_tokens_and_none_are_left_while_a_batch_waits(quota: int, batches: list[tuple[int, int]]) -> None:
    """Held against window after window, counted one by one."""
    tokens, spent, now_ns = Tokens(), Counter[int](), 0
    allowance = WINDOW_NS * quota // 100
    for pause_ns, run_ns in batches:
        now_ns += pause_ns
        end_ns = tokens.spend(now_ns, run_ns, quota)
        while run_ns:
            window = now_ns // WINDOW_NS
            ran_ns = min(run_ns, allowance - spent[window], (window + 1) * WINDOW_NS - now_ns)
            spent[window] += ran_ns
            run_ns -= ran_ns
            now_ns = now_ns + ran_ns if ran_ns else (window + 1) * WINDOW_NS
        assert now_ns == end_ns


def test_a_batch_stands_still_when_the_tokens_of_a_window_are_spent() -> None:
    """20 ms on half of the SMs at a quota of 20 %, 8 ms of each 40: 8, 8 and 4."""
    (record,) = play(Planned((0, Size(50, 20))), [1000]).records
    assert record.parts["total"].most_ns == 2 * WINDOW_NS + 4 * MS
    assert record.parts["queue"].most_ns == 0


def test_requests_that_wait_share_a_batch() -> None:
    (record,) = play(Planned((0, Size(100, 100, 4))), [1000, 1001, 1002, 1003, 1004, 1005]).records
    assert record.parts["total"].most_ns == (10 + 40 + 10 - 5) * MS, "one alone, four together, the last"


def test_requests_wait_for_a_pod_that_starts() -> None:
    """Pods that are there before the load cost no start, later ones do."""
    (record,) = play(Planned((2, Size(100, 100))), [1000]).records
    assert record.parts["queue"].most_ns == (2 + 5 - 1) * S


def test_a_request_that_waits_too_long_is_given_up_and_what_waits_at_the_end_is_not_forgotten() -> None:
    (record,) = play(Planned(), [1000, 58_000], timeout_ns=30 * S).records
    assert record.rejected == {TIMED_OUT: 1, "no pod until the end": 1}
    (served,) = play(Planned((57, Size(100, 100))), [58_000]).records
    assert served.answered == 1, "its pod was on its way"


def test_the_area_and_the_whole_gpu_are_charged_from_start_to_end() -> None:
    scaler = Planned((0, Size(50, 40)), (10, Size(25, 80)), end_s=30)
    gpus = play(scaler, [20_000])
    assert gpus.area_ns == pytest.approx((0.2 * 30 + 0.2 * 20) * S)
    assert gpus.whole_ns == 30 * S
    assert gpus.busy_ns == pytest.approx(0.5 * 20 * MS)
    assert (gpus.starts, gpus.most_used, len(scaler.gone)) == (1, 1, 2)


def test_what_is_busy_is_charged_until_it_is_done() -> None:
    """200 requests of 20 ms at a quota of half come just before the end: it takes 8 s more."""
    gpus = play(Planned((0, Size(50, 50))), [59_900 + n / 10 for n in range(200)])
    assert gpus.records[0].answered == 200
    assert gpus.whole_ns == pytest.approx((59.9 + 8) * S, rel=0.002)
    assert gpus.busy_ns <= gpus.area_ns


@pytest.mark.parametrize(("sharing", "held"), [(True, GIB), (False, 3 * GIB)])
def test_weights_are_held_once_where_models_are_shared(sharing: bool, held: int) -> None:
    pods = [(0, Size(10, 20))] * 3
    gpus = play(Planned(*pods, end_s=50), [], span_s=40, sharing=sharing)
    assert gpus.free_bytes == [4 * GIB], "all have gone"
    engine = Engine()
    scaler = Planned(*pods)
    gpus = SharedGpus(engine, [Model("m0", 10 * MS, GIB, 0, S)], Fixed(), [4 * GIB], scaler, pod_start_ns=S, sharing=sharing)
    gpus.start()
    assert gpus.free_bytes == [4 * GIB - held]
    assert gpus.has_memory(0, 0)
    gpus.end(gpus.pods[0][0])
    assert gpus.free_bytes == [4 * GIB - held + (0 if sharing else GIB)]


def test_a_share_of_the_sms_and_of_the_time_is_a_share_of_the_throughput() -> None:
    """Half the SMs for 60 % of the time serve 30 requests of 10 ms a second."""
    span_s = 200
    arrivals = poisson(60, span_s * S, np.random.default_rng(1))
    engine = Engine()
    gpus = SharedGpus(
        engine, [Model("m0", 10 * MS, GIB, 0, S, timeout_ns=S)], Fixed(), [4 * GIB], Planned((0, Size(50, 60))), pod_start_ns=S, sharing=False
    )
    assert gpus.per_s(0, Size(50, 60)) == pytest.approx(30)
    gpus.start()
    engine.at(span_s * S, gpus.stop)
    engine.run(Arrivals(("m0",), arrivals, np.zeros(len(arrivals), np.int32), span_s * S), gpus.arrive)
    assert gpus.records[0].requests == len(arrivals)
    assert gpus.records[0].answered == pytest.approx(30 * span_s, rel=0.01)
    assert gpus.busy_ns == pytest.approx(gpus.area_ns, rel=0.01)
