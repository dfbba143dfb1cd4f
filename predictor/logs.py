"""What the predictor writes to its log: plain or JSON lines, and a line for a request where that was asked for.

Owns the lines' form and how many there may be. Decides nothing.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable

from contracts.units import S, ms
from predictor.front import Finished
from predictor.protocols.tracing import context_of

access = logging.getLogger("sluice.access")


class TextLines(logging.Formatter):
    """For people; what a record brings as `fields` follows as name=value."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(name)s %(levelname)s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        """The first line."""
        return " ".join([super().formatMessage(record), *(f"{name}={value}" for name, value in getattr(record, "fields", {}).items())])


class JsonLines(logging.Formatter):
    """One JSON object a line: time (seconds since 1970), level, logger, message, `fields`, and the traceback of an error."""

    def format(self, record: logging.LogRecord) -> str:
        """A line."""
        line = {"time": round(record.created, 6), "level": record.levelname, "logger": record.name, "message": record.getMessage()}
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line)


def configure(form: str) -> None:
    """Logs to standard error as "text" or "json"."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if form == "json" else TextLines())
    logging.basicConfig(level=logging.INFO, handlers=[handler])


def access_log(lines_per_s: float, clock: Callable[[], int] = time.monotonic_ns) -> Callable[[Finished], None]:
    """Writes one line for each request, but no more than so many a second; the next line says how many were left out (`skipped`)."""
    credit, last_ns, skipped = max(1.0, lines_per_s), clock(), 0

    def write(finished: Finished) -> None:
        nonlocal credit, last_ns, skipped
        now_ns = clock()
        credit = min(max(1.0, lines_per_s), credit + (now_ns - last_ns) * lines_per_s / S)
        last_ns = now_ns
        if credit < 1:
            skipped += 1
            return
        credit -= 1
        access.info("request", extra={"fields": _fields(finished, skipped)})
        skipped = 0

    return write


def _fields(finished: Finished, skipped: int) -> dict[str, object]:
    outcome = finished.outcome
    fields: dict[str, object] = {
        "function": finished.function,
        "outcome": finished.kind,
        "total_ms": round(ms(finished.end_ns - finished.start_ns), 3),
    }
    if outcome is not None:
        fields |= {f"{name}_ms": round(ms(getattr(outcome, f"{name}_ns")), 3) for name in ("queue", "swap", "run")}
    trace = context_of(finished)
    if trace.is_valid:
        fields["trace_id"] = f"{trace.trace_id:032x}"
    return fields | ({"skipped": skipped} if skipped else {})
