"""How much memory of its own each process of a node has, and how fast that grows with the requests it answers."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Mapping

import numpy as np
import psutil

from contracts.units import MIB

SAMPLES = 50
"""A line through so many points is not bent by one of them."""
ROLES = ("predictor", "agent", "lane")
_MODULES = {"predictor": "predictor", "nodeagent": "agent", "predictor.worker": "lane"}


class Footprints:
    """Samples of the unshared memory (USS) of a node's processes, by role, over the number of requests answered."""

    def __init__(self, node: psutil.Process) -> None:
        self._node = node
        self._samples: list[tuple[int, Mapping[str, int]]] = []

    def sample(self, requests: int) -> None:
        """Takes one, after so many requests."""
        found: Counter[str] = Counter()
        for process in self._node.children(recursive=True):
            with contextlib.suppress(psutil.Error):
                command = process.cmdline()
                role = _MODULES.get(command[command.index("-m") + 1]) if "-m" in command else None
                if role is not None:
                    found[role] = max(found[role], process.memory_full_info().uss)
        self._samples.append((requests, found))

    def growth_mib(self, per: int) -> dict[str, float]:
        """MiB that `per` requests add, by role: the slope of the line through the samples."""
        requests = [count for count, _ in self._samples]
        return {role: float(np.polyfit(requests, [found[role] for _, found in self._samples], 1)[0]) * per / MIB for role in ROLES}
