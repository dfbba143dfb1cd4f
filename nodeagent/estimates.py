"""What the scheduler expects: run times by batch size and how soon a function is needed again. Pure; learnt from what was measured."""

from __future__ import annotations

from contracts.units import S

_GAIN_SHIFT = 3  # an exponential average with gain 1/8


class RunEstimate:
    """GPU time of a batch by its rows: an average of what was measured; unmeasured sizes are scaled from the nearest measured one."""

    __slots__ = ("_by_rows", "_first_ns")

    def __init__(self, first_ns: int) -> None:
        self._first_ns = max(1, first_ns)
        self._by_rows: dict[int, int] = {}

    @property
    def measured(self) -> bool:
        """Some batch has run."""
        return bool(self._by_rows)

    def run_ns(self, rows: int) -> int:
        """Expected GPU time of a batch."""
        known = self._by_rows.get(rows)
        if known is not None:
            return known
        if not self._by_rows:
            return self._first_ns * rows
        near = min(self._by_rows, key=lambda r: abs(r - rows))
        return max(1, self._by_rows[near] * rows // near)

    def observe(self, rows: int, gpu_ns: int) -> None:
        """A batch took this long."""
        known = self._by_rows.get(rows)
        self._by_rows[rows] = gpu_ns if known is None else known + ((gpu_ns - known) >> _GAIN_SHIFT)

    def rescale(self, old_sm_percent: int, new_sm_percent: int) -> None:
        """The SM share changed: compute-bound work takes inversely longer, until measured again."""
        if old_sm_percent == new_sm_percent:
            return
        self._first_ns = max(1, self._first_ns * old_sm_percent // new_sm_percent)
        self._by_rows = {rows: ns * old_sm_percent // new_sm_percent for rows, ns in self._by_rows.items()}


class NeedEstimate:
    """How often a function is called: an average of the gaps between its requests."""

    __slots__ = ("_gap_ns", "_last_ns")

    def __init__(self, now_ns: int) -> None:
        self._gap_ns = 60 * S
        self._last_ns = now_ns

    def arrived(self, now_ns: int) -> None:
        """A request came."""
        self._gap_ns += (now_ns - self._last_ns - self._gap_ns) >> _GAIN_SHIFT
        self._last_ns = now_ns

    def per_second(self, now_ns: int) -> float:
        """The rate to expect: a function that has been silent for longer than its usual gap is taken at its silence."""
        silent_ns = now_ns - self._last_ns
        gap_ns = silent_ns if silent_ns > self._gap_ns else self._gap_ns
        return S / gap_ns if gap_ns > 1 else float(S)
