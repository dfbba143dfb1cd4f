"""What holds lanes to their SMs: the choice, the sizes, and what counts as proof."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contracts.errors import InvalidValue, Unavailable
from contracts.functions import FunctionClass
from contracts.lane_wire import LaneReady
from nodeagent.shell.backends import Backend, Limits, Unproven, choose, first_sm
from nodeagent.shell.gpus import Gpu

H100 = Gpu("GPU-1", "H100", 132, (9, 0), 80 << 30, 13010, "0000:01:00.0")
A100 = Gpu("GPU-1", "A100", 108, (8, 0), 80 << 30, 12050, "0000:01:00.0")
V100 = Gpu("GPU-1", "V100", 80, (7, 0), 16 << 30, 12030, "0000:01:00.0")
LS, BE = FunctionClass.LATENCY_SENSITIVE, FunctionClass.BEST_EFFORT

CHOICES = {
    "MPS before all else": (H100, "", "auto", Backend.MPS, True),
    "green contexts that take turns, without MPS": (H100, "none", "auto", Backend.GREEN, False),
    "quotas alone, without either": (V100, "none", "auto", Backend.QUOTA, False),
    "green contexts side by side, when asked for": (H100, "", "green", Backend.GREEN, True),
    "quotas alone, when asked for": (H100, "", "quota", Backend.QUOTA, False),
    "MPS on a GPU that has no green contexts": (V100, "", "mps", Backend.MPS, True),
}


@pytest.mark.parametrize(("gpu", "no_mps", "asked", "backend", "overlap"), CHOICES.values(), ids=CHOICES)
def test_the_best_that_is_there_is_chosen(gpu: Gpu, no_mps: str, asked: str, backend: Backend, overlap: bool) -> None:
    limits = choose(gpu, no_mps, asked)
    assert (limits.backend, limits.overlap) == (backend, overlap) and limits.why


def test_what_was_asked_for_and_is_not_there_is_an_error() -> None:
    with pytest.raises(Unavailable, match="cannot be had on H100: no binary"):
        choose(H100, "no binary", "mps")
    with pytest.raises(Unavailable, match=r"they need a driver of CUDA 12\.5, this one is of 12\.3"):
        choose(V100, "", "green")
    with pytest.raises(InvalidValue, match="sm-backend"):
        choose(H100, "", "partitions")


SIZES = {
    "whole groups of 8 on Hopper": (H100, 50, 64),
    "the whole of it is the whole": (H100, 100, 132),
    "rounded down, never up": (H100, 12, 8),
    "pairs on Ampere": (A100, 25, 26),
    "four at least on Ampere": (A100, 4, 4),
}


@pytest.mark.parametrize(("gpu", "sm_percent", "sms"), SIZES.values(), ids=SIZES)
def test_green_contexts_come_in_whole_groups(gpu: Gpu, sm_percent: int, sms: int) -> None:
    limits = choose(gpu, "", "green")
    assert limits.lane_sms(sm_percent) == sms and limits.refusal(sm_percent) is None


@given(st.sampled_from([H100, A100]), st.integers(1, 100))
def test_a_size_is_refused_or_a_lane_of_it_never_has_more_than_its_share(gpu: Gpu, sm_percent: int) -> None:
    limits = choose(gpu, "none", "green")
    if limits.refusal(sm_percent) is None:
        assert limits.least <= limits.lane_sms(sm_percent) <= gpu.sms * sm_percent / 100
    else:
        assert gpu.sms * sm_percent / 100 < limits.least


def test_without_limits_only_the_whole_is_served() -> None:
    limits = choose(V100, "none", "auto")
    assert limits.refusal(100) is None
    assert "only sm-percent 100 is served" in (limits.refusal(99) or "")


def test_a_lane_s_environment_holds_it_and_puts_best_effort_behind() -> None:
    assert choose(H100, "").environment(30, BE) == {"CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": "30", "CUDA_MPS_CLIENT_PRIORITY": "1"}
    assert choose(H100, "", "green").environment(30, LS) == {"CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": "100", "CUDA_MPS_CLIENT_PRIORITY": "0"}
    assert choose(H100, "none").environment(30, LS) == {}


def ready(sms: int, measured: float) -> LaneReady:
    return LaneReady(1, 1, 50, sms, measured)


PROVEN = {
    "exactly what was asked": ("mps", 50, 66, 50.0),
    "rounded down to a pair": ("mps", 33, 42, 32.0),
    "a tenth less than was asked": ("mps", 50, 60, 45.0),
    "the smallest there is": ("mps", 1, 2, 1.5),
    "a green context's whole groups": ("green", 50, 64, 48.0),
    "the whole, which need not be measured": ("mps", 100, 132, 0.0),
    "no limit where none was asked": ("quota", 100, 132, 0.0),
}


@pytest.mark.parametrize(("backend", "sm_percent", "sms", "measured"), PROVEN.values(), ids=PROVEN)
def test_what_was_asked_for_is_proof(backend: str, sm_percent: int, sms: int, measured: float) -> None:
    assert choose(H100, "", backend).prove(sm_percent, ready(sms, measured)) is None


UNPROVEN = {
    "the whole GPU, as MPS gives it to a process that does not find its daemon": ("mps", 50, 132, 100.0, "reads back 132 SMs, not 59 to 66"),
    "one SM more": ("mps", 50, 67, 50.0, "67"),
    "far fewer": ("mps", 50, 40, 30.0, "40"),
    "a green context of other groups": ("green", 50, 66, 50.0, "not 64"),
    "less than the whole": ("mps", 100, 66, 0.0, "not 132"),
    "the right number, and the speed of more": ("mps", 50, 66, 60.0, r"computes at 60\.0 %"),
    "the right number, and no measurement": ("mps", 50, 66, 0.0, r"computes at 0\.0 %"),
    "a measurement that is no number": ("mps", 50, 66, float("nan"), "computes at nan"),
    "none at all": ("mps", 50, 0, 0.0, "reads back 0 SMs"),
}


@pytest.mark.parametrize(("backend", "sm_percent", "sms", "measured", "reason"), UNPROVEN.values(), ids=UNPROVEN)
def test_anything_else_is_none(backend: str, sm_percent: int, sms: int, measured: float, reason: str) -> None:
    with pytest.raises(Unproven, match=reason):
        choose(H100, "", backend).prove(sm_percent, ready(sms, measured))


def test_less_speed_than_its_sms_should_give_is_no_breach_but_is_said() -> None:
    warning = choose(H100, "").prove(50, ready(66, 30.0))
    assert warning is not None and "30.0 %" in warning


def test_lanes_share_no_sms_where_the_sum_allows() -> None:
    limits = choose(H100, "", "green")
    taken: list[tuple[int, int]] = []
    for sm_percent in (50, 25, 25):
        sms = limits.lane_sms(sm_percent)
        taken.append((first_sm(limits, sms, taken), sms))
    assert taken == [(0, 64), (64, 32), (96, 32)]
    assert first_sm(limits, 64, [(0, 64)]) == 64, "two halves"
    assert first_sm(limits, 132, taken) == 0
    assert first_sm(choose(H100, ""), 66, taken) == 0, "MPS chooses for itself"


@given(st.lists(st.tuples(st.integers(0, 15), st.integers(1, 4)), max_size=6), st.integers(6, 100))
def test_a_lane_s_place_lies_within_the_gpu_and_no_other_is_shared_less(groups: list[tuple[int, int]], sm_percent: int) -> None:
    limits = choose(H100, "", "green")
    sms = limits.lane_sms(sm_percent)
    taken = [(8 * first, 8 * count) for first, count in groups]
    first = first_sm(limits, sms, taken)

    def shared(at: int) -> int:
        return sum(len(set(range(at, at + sms)) & set(range(start, start + count))) for start, count in taken)

    assert 0 <= first <= limits.sms - sms and first % limits.step == 0
    assert shared(first) == min(shared(at) for at in range(0, limits.sms - sms + 1, limits.step))


def test_a_device_without_overlap_is_told_apart() -> None:
    assert not Limits(Backend.QUOTA, 132, overlap=False, why="").environment(100, LS)
