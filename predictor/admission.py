"""Whether a request still has a chance: estimates from recent batches, and the refusal of what cannot be answered in time. Pure.

Owns the estimates of one function. Reads no clock and queues nothing. Refusing early what would only time out is what keeps goodput up under
overload (DAGOR, Zhou et al., SoCC 2018); a function with nothing outstanding is never refused, so a bad estimate always meets a new measurement.
"""

from __future__ import annotations

from contracts.units import MS

_WEIGHT = 4
"""A new measurement counts for 1 / _WEIGHT of an estimate."""


class Estimates:
    """What recent batches of one function took. 0 means not measured yet.

    `run_ns`: standing still for weights and running, of one batch. `service_ns`: how far apart answers come while batches are outstanding, which
    holds what the function's share and its neighbours cost it.
    """

    def __init__(self) -> None:
        self.run_ns = 0
        self.service_ns = 0
        self._last_answer_ns = 0

    def observe(self, submitted_ns: int, answered_ns: int, run_ns: int) -> None:
        """A batch that was submitted then was answered now and took so much swap and run time."""
        self.run_ns = _blend(self.run_ns, run_ns)
        self.service_ns = _blend(self.service_ns, answered_ns - max(submitted_ns, self._last_answer_ns))
        self._last_answer_ns = answered_ns

    def hurry_ns(self, now_ns: int, slo_deadline_ns: int, deadline_ns: int) -> int:
        """Until when a request that arrives now may wait for company: its SLO less the run.

        Where the SLO is shorter than the run, hurry would help nobody and cost everybody their batch: then the request's own deadline counts.
        """
        slack_end = slo_deadline_ns - self.run_ns
        return slack_end if slack_end > now_ns else max(now_ns, deadline_ns - self.run_ns)

    def retry_after_ms(self, now_ns: int, deadline_ns: int, rows: int, rows_ahead: int, max_batch: int) -> int:
        """0 when a request of `rows` rows behind `rows_ahead` others can be answered by its deadline; else how long to wait before another try."""
        if rows_ahead == 0:
            return 0
        batches = -(-(rows_ahead + rows) // max_batch)
        late_ns = now_ns + batches * self.service_ns - deadline_ns
        return -(-late_ns // MS) if late_ns > 0 else 0


def _blend(estimate: int, measured: int) -> int:
    measured = max(measured, 1)
    return measured if estimate == 0 else estimate + (measured - estimate) // _WEIGHT
