"""Accounts: exact shares whatever the batch length, one window saved at most, nothing lost by waiting, tiers in the right order."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contracts.functions import FunctionClass, Share
from contracts.units import MS, S
from nodeagent.tokens import NEVER_NS, Account, Tier, lateness_rank

LS, BE = FunctionClass.LATENCY_SENSITIVE, FunctionClass.BEST_EFFORT
WINDOW = 100 * MS


def account(quota: float = 10, limit: float = 100, cls: FunctionClass = LS, now_ns: int = S) -> Account:
    return Account(cls, Share.of(100, quota, limit), WINDOW, now_ns)


@given(st.integers(1, 10_000), st.lists(st.integers(1, 500 * MS), min_size=1, max_size=50))
def test_a_saturating_function_held_to_its_limit_gets_exactly_its_share(quota_bp: int, batches: list[int]) -> None:
    """It starts a batch whenever it may: what it used never runs ahead of quota x time by more than the one batch and the saved window."""
    it = Account(LS, Share(100, quota_bp, quota_bp), WINDOW, 0)
    now = used = 0
    for gpu_ns in batches:
        tier, until = it.tier(now)
        while tier is Tier.BLOCKED:
            now = until
            tier, until = it.tier(now)
        now += gpu_ns
        used += gpu_ns
        it.charge(gpu_ns)
        if quota_bp < 10_000:
            ahead = used * 10_000 - (now + WINDOW) * quota_bp
            assert ahead <= gpu_ns * 10_000 + quota_bp * len(batches)


def test_a_long_batch_leaves_a_debt_that_time_repays() -> None:
    it = account(quota=10)
    it.charge(250 * MS)
    assert it.tier(S)[0] is Tier.LS_BORROWED
    # 10 ms were saved, 240 ms are owed: 2.4 s at a tenth of the time.
    assert it.tier(S + 2400 * MS)[0] is Tier.LS_BORROWED
    assert it.tier(S + 2400 * MS + 1)[0] is Tier.LS_GUARANTEED


def test_an_idle_function_saves_one_window_and_no_more() -> None:
    it = account(quota=10)
    it.wake(S + 60 * S)
    it.charge(10 * MS)
    assert it.tier(61 * S)[0] is Tier.LS_BORROWED


def test_a_function_that_waits_loses_nothing() -> None:
    it = account(quota=50)
    later = S + 10 * S
    it.charge(5 * S)
    assert it.tier(later)[0] is Tier.LS_GUARANTEED, "ten seconds at a half are five, and the saved window is still there"


def test_a_running_batch_counts_at_its_estimate() -> None:
    it = account(quota=20, limit=20)
    it.begin(30 * MS)
    assert it.tier(S)[0] is Tier.BLOCKED
    it.end(30 * MS)
    assert it.tier(S)[0] is Tier.LS_GUARANTEED


TIERS = {
    "latency-sensitive, within its guarantee": (LS, 100, 0, 0, Tier.LS_GUARANTEED),
    "latency-sensitive, borrowing": (LS, 100, 50 * MS, 0, Tier.LS_BORROWED),
    "latency-sensitive, over its limit": (LS, 15, 50 * MS, 0, Tier.BLOCKED),
    "latency-sensitive, its guarantee overdue": (LS, 100, 0, 101 * MS, Tier.LS_OVERDUE),
    "best-effort, within its guarantee": (BE, 100, 0, 0, Tier.BE_GUARANTEED),
    "best-effort, borrowing": (BE, 100, 50 * MS, 0, Tier.BE_BORROWED),
    "best-effort, its guarantee overdue": (BE, 100, 0, 101 * MS, Tier.BE_OVERDUE),
}


@pytest.mark.parametrize(("cls", "limit", "used", "later", "expected"), TIERS.values(), ids=TIERS.keys())
def test_tiers(cls: FunctionClass, limit: float, used: int, later: int, expected: Tier) -> None:
    it = account(10, limit, cls)
    it.charge(used)
    assert it.tier(S + later)[0] is expected


@given(st.sampled_from([LS, BE]), st.sampled_from([(10, 100), (10, 15), (0.01, 100)]), st.integers(0, 200 * MS), st.integers(0, 2 * S))
def test_a_tier_lasts_exactly_until_it_says(cls: FunctionClass, share: tuple[float, float], used: int, later: int) -> None:
    it = account(*share, cls)
    it.charge(used)
    now = S + later
    tier, until = it.tier(now)
    assert until > now
    if until < NEVER_NS:
        assert it.tier(until - 1)[0] is tier
        assert it.tier(until)[0] is not tier


def test_a_new_share_keeps_what_is_owed() -> None:
    it = account(quota=10)
    it.charge(60 * MS)
    it.set_share(Share.of(100, 50), S)
    # 50 ms are owed: at a half of the time that takes 100 ms.
    assert it.tier(S + 100 * MS)[0] is Tier.LS_BORROWED
    assert it.tier(S + 100 * MS + 1)[0] is Tier.LS_GUARANTEED


def test_a_new_share_does_not_multiply_what_is_saved() -> None:
    it = account(quota=1)
    it.set_share(Share.of(100, 100), S)
    it.charge(101 * MS)
    assert it.tier(S)[0] is Tier.LS_BORROWED


def test_late_work_that_can_be_back_in_slo_soonest_goes_first() -> None:
    nearly, far, satisfied = lateness_rank(98, 100, 97), lateness_rank(98, 100, 50), lateness_rank(98, 100, 100)
    assert nearly < far < satisfied
