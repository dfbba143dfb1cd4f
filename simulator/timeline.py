"""What devices and lanes did when, as a Chrome trace (Trace Event Format): open it in Perfetto or chrome://tracing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_MOST = 200_000
"""Events, so that the viewer still opens the file; the first ones are kept."""


class Timeline:
    """Spans by device (a process of the trace) and by lane or link (a thread of it)."""

    def __init__(self) -> None:
        self._events: list[dict[str, Any]] = []
        self._tracks: dict[tuple[str, str], tuple[int, int]] = {}
        self._devices: dict[str, int] = {}

    def span(self, device: str, track: str, name: str, start_ns: int, end_ns: int) -> None:
        """Something took from then until then."""
        if len(self._events) < _MOST and end_ns > start_ns:
            process, thread = self._place(device, track)
            span = {"ph": "X", "name": name, "pid": process, "tid": thread, "ts": start_ns / 1000, "dur": (end_ns - start_ns) / 1000}
            self._events.append(span)

    def write(self, path: Path) -> None:
        """The whole trace as one JSON file."""
        path.write_text(json.dumps({"traceEvents": self._events, "displayTimeUnit": "ms"}))

    def _place(self, device: str, track: str) -> tuple[int, int]:
        known = self._tracks.get((device, track))
        if known is None:
            process = self._devices.setdefault(device, len(self._devices) + 1)
            known = self._tracks[device, track] = process, len(self._tracks) + 1
            for kind, number, name in (("process_name", 0, device), ("thread_name", known[1], track)):
                self._events.append({"ph": "M", "name": kind, "pid": process, "tid": number, "args": {"name": name}})
        return known
