"""Pairs of functions side by side, each in its share, on a real node: what `profiler.interference` learns from.

Owns the measuring. Alone and beside take turns, so that a machine that becomes slower meanwhile does not count as interference.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from contracts.errors import InvalidValue
from contracts.functions import Function, ModelRef, Share
from contracts.units import MS
from models.describe import describe
from models.samples import sample_inputs
from profiler import interference
from profiler.dataset import device_key
from profiler.device import DeviceFacts
from profiler.extract import extract
from profiler.features import Features
from profiler.interference import Demand, Interference, Pair
from profiler.quiet import Watch
from profiler.session import Caller, NodeOptions, Session, saturating
from profiler.sweep import facts_of, running

SPLITS = ((50, 50), (25, 75), (75, 25))
_TURNS = 4
_WARM_UP = 2
_FEWEST = 3


def measure(
    functions: Sequence[Function],
    node: NodeOptions | Session | None = None,
    *,
    batch: int = 1,
    seconds: float = 4.0,
    seed: int = 1,
    beside_load: bool = False,
    features: Callable[[ModelRef, Mapping[str, int]], Features] = extract,
    on_progress: Callable[[Pair, int, int], None] = lambda *_: None,
) -> Interference:
    """Runs every pair in every split of the SMs for about `seconds`, and fits the factor. `on_progress(pair, done, of)`.

    InvalidValue for fewer than two functions; Refused beside other load, unless that is allowed; what `features` raises for a graph it cannot count.
    """
    if len(functions) < 2:
        raise InvalidValue("interference needs two functions or more", key="functions", value=[function.key for function in functions])
    pairs: list[Pair] = []
    total = len(functions) * (len(functions) - 1) * len(SPLITS)
    with running(functions, node or NodeOptions()) as session:
        device, facts = facts_of(session)
        loads = {function.key: _Load(function, batch, seed, features) for function in functions}
        for couple in combinations(functions, 2):
            if not beside_load:
                Watch(session, device).require_quiet()
            one, other = (loads[function.key] for function in couple)
            for run in _side_by_side(session, one, other, seconds):
                demands = [load.demand(ms, facts) for load, ms in zip((one, other), run.alone_ms, strict=True)]
                for at, beside in ((0, 1), (1, 0)):
                    pair = Pair(
                        function=couple[at].key,
                        neighbour=couple[beside].key,
                        sm_percent=run.split[at],
                        neighbour_sm_percent=run.split[beside],
                        demand=demands[at],
                        neighbour_demand=demands[beside],
                        slowdown=run.beside_ms[at] / run.alone_ms[at],
                    )
                    pairs.append(pair)
                    on_progress(pair, len(pairs), total)
    return interference.fit(device_key(facts), pairs)


class _Load:
    """A function with its batch, and what the graph says that the batch moves and computes."""

    def __init__(self, function: Function, batch: int, seed: int, features: Callable[[ModelRef, Mapping[str, int]], Features]) -> None:
        self.function = function
        self.signature = describe(function.model).signature
        rows = batch if self.signature.batchable else 1
        self.inputs = sample_inputs(function.model, rows, seed)
        sizes = self.signature.bind({spec.name: (spec.dtype, self.inputs[spec.name].shape) for spec in self.signature.inputs})
        self._totals = features(function.model, {name: size for name, size in sizes.items() if name != "batch"}).totals(rows)

    def demand(self, gpu_ms: float, facts: DeviceFacts) -> Demand:
        """Of a run that takes so long."""
        return Demand.of(self._totals.bytes, self._totals.flops, gpu_ms, facts)


@dataclass(frozen=True, slots=True)
class _Run:
    """Two functions in a split of the SMs: GPU time of a batch of each, alone and beside the other."""

    split: tuple[int, int]
    alone_ms: tuple[float, float]
    beside_ms: tuple[float, float]


def _side_by_side(session: Session, one: _Load, other: _Load, seconds: float) -> Iterator[_Run]:
    first = Share.of(SPLITS[0][0], 100), Share.of(SPLITS[0][1], 100)
    with (
        session.serving(one.function, first[0]) as key,
        session.serving(other.function, first[1]) as other_key,
        session.caller(key, one.signature, one.inputs) as caller,
        session.caller(other_key, other.signature, other.inputs) as other_caller,
    ):
        for split in SPLITS:
            # The smaller share first: at no moment is more promised than there is.
            for sm_percent, which in sorted(zip(split, (key, other_key), strict=True)):
                session.set_share(which, Share.of(sm_percent, 100))
            yield _turns(split, caller, other_caller, seconds)


def _turns(split: tuple[int, int], caller: Caller, other: Caller, seconds: float) -> _Run:
    """Each of the two, alone and beside the other, `_TURNS` times in turn; the medians."""
    alone: tuple[list[int], list[int]] = ([], [])
    beside: tuple[list[int], list[int]] = ([], [])
    slice_s = seconds / (4 * _TURNS)
    for _ in range(_TURNS):
        for at, (mine, neighbour) in enumerate(((caller, other), (other, caller))):
            alone[at].extend(_run_ns(mine, slice_s))
            with saturating(neighbour):
                beside[at].extend(_run_ns(mine, slice_s))
    medians = [statistics.median(values) / MS for values in (*alone, *beside)]
    return _Run(split, (medians[0], medians[1]), (medians[2], medians[3]))


def _run_ns(caller: Caller, seconds: float) -> list[int]:
    """GPU times of batches one after another, after some that are not counted."""
    for _ in range(_WARM_UP):
        caller.call()
    found: list[int] = []
    end = time.monotonic() + seconds
    while len(found) < _FEWEST or time.monotonic() < end:
        found.append(caller.call()[0].run_ns)
    return found
