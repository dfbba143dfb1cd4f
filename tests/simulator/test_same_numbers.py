"""Speed changes nothing: every answer of these worlds, its time and its parts are what they were before the code was made faster.

A change of policy changes these numbers, and then they are recorded anew: the failing test says what they are now.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass, field

import numpy as np
import pytest

from contracts.functions import Function, FunctionClass, ModelFormat, ModelRef, Share, Slo
from contracts.units import GIB, MIB, MS, S
from nodeagent import events as ev
from nodeagent.settings import DeviceSpec
from simulator.arrivals import Arrivals
from simulator.engine import Engine
from simulator.front import Fronts
from simulator.node import Hardware, SimulatedNode

START_NS = 10 * S


class Affine:
    """A fixed part and a part for each row, which takes inversely longer on fewer SMs."""

    def run_ns(self, function: str, rows: int, sm_percent: int) -> int:
        """`RunTimes`."""
        return 2 * MS + (3 + int(function.rpartition("f")[2]) % 4) * MS * rows * 100 // sm_percent


class Watch:
    """Hears every outcome before the predictors do."""

    def __init__(self, engine: Engine, fronts: Fronts) -> None:
        self._engine = engine
        self._fronts = fronts
        self._digest = hashlib.sha256()

    def answered(self, answer: ev.Answer) -> None:
        """`Listener`."""
        self._digest.update(repr((self._engine.now_ns, answer.queue_ns, answer.swap_ns, answer.run_ns, answer.cold, answer.device)).encode())
        self._fronts.answered(answer)

    def rejected(self, reject: ev.Reject) -> None:
        """`Listener`."""
        self._digest.update(repr((self._engine.now_ns, reject.reason.value, reject.retry_after_ms)).encode())
        self._fronts.rejected(reject)

    @property
    def seen(self) -> str:
        """All outcomes so far as one number."""
        return self._digest.hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Case:
    """A world: `per_s` requests a second over all functions, of which the first are called most."""

    functions: int
    per_s: float
    devices: int = 4
    memory: int = GIB
    links: int = 2
    sm: tuple[int, ...] = (100,)
    classes: tuple[FunctionClass, ...] = (FunctionClass.LATENCY_SENSITIVE,)
    limit_bp: int = 10_000
    max_batch: int = 8
    timeout_ns: int = 30 * S
    requests: int = 2500
    hardware: Hardware = field(default_factory=Hardware)


LS, BE = FunctionClass
CASES = {
    "all weights fit": (Case(40, 200, memory=16 * GIB), "5bf18ac2a006fea3"),
    "half of the weights fit": (Case(60, 150), "a30d174138e3e669"),
    "overload": (Case(60, 900, timeout_ns=S // 2), "212bf0b0b57700a8"),
    "both classes, three sizes of share": (Case(60, 400, sm=(100, 50, 30), classes=(LS, LS, BE)), "2fafd3803d2f55f8"),
    "best effort under pressure": (Case(30, 700, sm=(50, 100), classes=(LS, BE), memory=600 * MIB, timeout_ns=2 * S), "f42575160299f78f"),
    "limits, one link for all, neighbours": (
        Case(30, 500, limit_bp=1300, links=1, sm=(40,), hardware=Hardware(neighbour_slowdown=0.3, tail=0.3)),
        "db552264f7c3bb88",
    ),
    "one device, single requests": (Case(10, 90, devices=1, max_batch=1, memory=500 * MIB), "f3ce33021a1f2e67"),
}


def outcome(case: Case) -> str:
    """Plays a case: the digest of its outcomes."""
    chance = random.Random(case.functions * 1000 + case.devices)
    engine = Engine()
    specs = [DeviceSpec(f"gpu:{n}", case.memory, 10_000_000_000, f"link:{n % case.links}") for n in range(case.devices)]
    node = SimulatedNode(engine, specs, Affine(), case.hardware)
    quota_bp = max(1, case.devices * 9000 // case.functions)
    functions = [
        Function(
            f"f{n}",
            ModelRef(ModelFormat.CATALOG, "none"),
            cls=case.classes[n % len(case.classes)],
            share=Share(case.sm[n % len(case.sm)], quota_bp, max(quota_bp, case.limit_bp)),
            slo=Slo((40 + 20 * (n % 3)) * MS),
            max_batch=case.max_batch,
            timeout_ns=case.timeout_ns,
        )
        for n in range(case.functions)
    ]
    fronts = Fronts(engine, functions, [node] * case.functions)
    node.listener = watch = Watch(engine, fronts)
    for n, function in enumerate(functions):
        weight_bytes = (40 + 30 * (n % 3)) * MIB
        node.handle(ev.FunctionDeclared(ev.FunctionSpec(function.key, function.cls, function.share, function.slo, weight_bytes, 5 * MS)))
    engine.settle(START_NS)
    at_ns, called = START_NS, []
    for _ in range(case.requests):
        at_ns += chance.randrange(1, int(2 * S / case.per_s))
        called.append((at_ns, min(chance.randrange(case.functions), chance.randrange(case.functions))))
    arrivals = Arrivals(
        tuple(function.key for function in functions), np.array([a for a, _ in called], np.int64), np.array([f for _, f in called], np.int32), at_ns
    )
    engine.run(arrivals, fronts.arrive)
    node.state.check()
    assert sum(record.requests for record in fronts.records.values()) == case.requests
    return watch.seen


@pytest.mark.parametrize(("case", "expected"), CASES.values(), ids=CASES.keys())
def test_the_same_seed_gives_what_it_always_gave(case: Case, expected: str) -> None:
    assert outcome(case) == expected
