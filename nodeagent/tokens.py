"""Tokens: who may run now, and in which order. Pure arithmetic on integers; no queue, no device.

An account is a leaky bucket kept as the time at which its balance is zero (the generic cell rate algorithm, ITU-T I.371): a batch of g ns moves
that time on by g / quota, and the function is within its guarantee while the time lies in the past. So the long-run share is exact whatever the batch
length. An idle function saves at most one window; a function that waits loses nothing, however long another's batch holds the device.
"""

from __future__ import annotations

import enum

from contracts.functions import FunctionClass, Share
from contracts.units import WHOLE_QUOTA_BP

NEVER_NS = 1 << 62


class Tier(enum.IntEnum):
    """Classes of urgency, most urgent first. STARVED is work that was overtaken as often as is allowed.

    Latency-sensitive before best-effort and guaranteed before borrowed time, with one exception: best-effort work whose guarantee has been
    overdue for a window goes before latency-sensitive work that only borrows, or borrowing could starve a paid share.
    """

    STARVED = 0
    LS_OVERDUE = 1
    LS_GUARANTEED = 2
    BE_OVERDUE = 3
    LS_BORROWED = 4
    BE_GUARANTEED = 5
    BE_BORROWED = 6
    BLOCKED = 7


_TIERS = {
    FunctionClass.LATENCY_SENSITIVE: (Tier.LS_OVERDUE, Tier.LS_GUARANTEED, Tier.LS_BORROWED),
    FunctionClass.BEST_EFFORT: (Tier.BE_OVERDUE, Tier.BE_GUARANTEED, Tier.BE_BORROWED),
}


class Account:
    """The GPU time of one function against its quota and its limit."""

    __slots__ = ("_due_ns", "_limit_due_ns", "_tiers", "_window_ns", "charged_ns", "pending_ns", "share")

    def __init__(self, cls: FunctionClass, share: Share, window_ns: int, now_ns: int) -> None:
        self.share = share
        self.charged_ns = 0
        self.pending_ns = 0
        self._tiers = _TIERS[cls]
        self._window_ns = window_ns
        self._due_ns = self._limit_due_ns = now_ns - window_ns

    @property
    def due_ns(self) -> int:
        """When the guarantee covers another start, counting the batches that run now at their estimate."""
        return self._due_ns + self.pending_ns * WHOLE_QUOTA_BP // self.share.quota_bp

    @property
    def limit_due_ns(self) -> int:
        """When the limit permits another start."""
        if self.share.limit_bp == WHOLE_QUOTA_BP:
            return 0
        return self._limit_due_ns + self.pending_ns * WHOLE_QUOTA_BP // self.share.limit_bp

    def wake(self, now_ns: int) -> None:
        """Work arrives at an idle function: forget what it saved beyond one window."""
        oldest = now_ns - self._window_ns
        if self._due_ns < oldest:
            self._due_ns = oldest
        if self._limit_due_ns < oldest:
            self._limit_due_ns = oldest

    def begin(self, estimate_ns: int) -> None:
        """A batch starts; until it is charged its estimate counts."""
        self.pending_ns += estimate_ns

    def end(self, estimate_ns: int) -> None:
        """A batch that began with this estimate is over."""
        self.pending_ns -= estimate_ns

    def charge(self, gpu_ns: int) -> None:
        """Pays for measured GPU time."""
        share, whole_ns = self.share, gpu_ns * WHOLE_QUOTA_BP
        self.charged_ns += gpu_ns
        self._due_ns += whole_ns // share.quota_bp
        self._limit_due_ns += whole_ns // share.limit_bp

    def set_share(self, share: Share, now_ns: int) -> None:
        """A new share from now on: what was saved or owed stays the same amount of GPU time, what was saved at most one new window's worth."""
        self._due_ns = now_ns - (now_ns - self._due_ns) * self.share.quota_bp // share.quota_bp
        self._limit_due_ns = now_ns - (now_ns - self._limit_due_ns) * self.share.limit_bp // share.limit_bp
        self.share = share
        self.wake(now_ns)

    def tier(self, now_ns: int) -> tuple[Tier, int]:
        """The tier now, and when it next changes by itself if nothing is charged."""
        overdue, guaranteed, borrowed = self._tiers
        limit_due = self.limit_due_ns
        if limit_due > now_ns:
            return Tier.BLOCKED, limit_due
        due = self.due_ns if self.pending_ns else self._due_ns
        if due >= now_ns:
            return borrowed, due + 1
        # One window may have been saved up; beyond two, a whole window has passed in which the guarantee was not given.
        overdue_at = due + 2 * self._window_ns
        if overdue_at >= now_ns:
            return guaranteed, overdue_at + 1
        return overdue, NEVER_NS


def lateness_rank(percentile: float, requests: int, on_time: int) -> tuple[bool, float]:
    """Order among requests that can no longer be on time: Torpor's required request count (ATC'25, section 5).

    RRC = (p n - m) / (1 - p) is how many requests on time it takes to be back in SLO: small and positive first, those that can afford a miss last.
    """
    p = percentile / 100
    required = (p * requests - on_time) / (1 - p)
    return required <= 0, required
