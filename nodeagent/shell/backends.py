"""What holds a lane of a GPU to its SMs: chosen by what was found, the same for all lanes of a device, and proven by each lane after its start.

Pure. Three ways, best first:
    mps    one process for each size, held by the driver (CUDA_MPS_ACTIVE_THREAD_PERCENTAGE) under a private MPS daemon; lanes overlap
    green  a green context in the lane; lanes overlap under that daemon too, and without it take turns
    quota  nothing holds a lane: only functions of 100 % of the SMs are served, one at a time
MPS's static partitions are none of them: they reserve SMs for every process that is there, idle ones and the slab's holder too, and lanes of a device
add up to more than the whole of it (only those that run do not).

MPS fails open: a process that does not find its daemon has the whole GPU. So a lane's word is not enough: it reads back the SMs of its own context,
and measures them. Sources: NVIDIA MPS documentation; CUDA driver API, "Green Contexts".
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence

import msgspec

from contracts.errors import InvalidValue, ProtocolError, Unavailable
from contracts.functions import FunctionClass
from contracts.lane_wire import LaneReady
from nodeagent.shell.gpus import Gpu

_GREEN_DRIVER = 12050
_GREEN_CAPABILITY = 6
_TOLERANCE = 0.1
_MPS_STEP = 2


class Backend(enum.StrEnum):
    """How a lane is held to its SMs. PACE is the CPU device's."""

    PACE = "pace"
    MPS = "mps"
    GREEN = "green"
    QUOTA = "quota"


SM_BACKENDS = ("auto", Backend.MPS.value, Backend.GREEN.value, Backend.QUOTA.value)
"""What may be asked for."""


class Unproven(ProtocolError):
    """A lane did not prove its SM cap."""


class Limits(msgspec.Struct, frozen=True):
    """How the lanes of one GPU are held. `overlap`: they run beside each other, under an MPS daemon. `why` is for people."""

    backend: Backend
    sms: int
    overlap: bool
    why: str
    step: int = 1
    least: int = 1

    def lane_sms(self, sm_percent: int) -> int:
        """How many SMs a lane of this size has to have; at most, for MPS, which rounds down in its own way."""
        return self.sms if sm_percent == 100 else self.sms * sm_percent // 100 // self.step * self.step

    def refusal(self, sm_percent: int) -> str | None:
        """Why no lane can be held to this size, None if one can."""
        if sm_percent == 100:
            return None
        if self.backend is Backend.QUOTA:
            return f"nothing here can hold it to {sm_percent} % of the SMs ({self.why}); only sm-percent 100 is served"
        if self.lane_sms(sm_percent) < self.least:
            least_percent = math.ceil(100 * self.least / self.sms)
            return f"{sm_percent} % of {self.sms} SMs is less than the {self.least} that {self.backend} can hold a lane to: give it {least_percent} %"
        return None

    def environment(self, sm_percent: int, cls: FunctionClass) -> dict[str, str]:
        """What a lane's environment must say beside where the daemon is."""
        if not self.overlap:
            return {}
        percent = sm_percent if self.backend is Backend.MPS else 100
        return {
            "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": str(percent),
            "CUDA_MPS_CLIENT_PRIORITY": "1" if cls is FunctionClass.BEST_EFFORT else "0",
        }

    def prove(self, sm_percent: int, ready: LaneReady) -> str | None:
        """Checks what a lane read back and measured; Unproven when it has more than it may, or not what was asked for.

        Less speed than its SMs should give is no breach of the cap, since others may have been running beside it: it is returned as a warning.
        """
        asked = self.lane_sms(sm_percent)
        if self.backend is Backend.MPS and sm_percent < 100:
            exact = self.sms * sm_percent / 100
            most, least = math.ceil(exact), max(1, math.floor(min(exact * (1 - _TOLERANCE), exact - _MPS_STEP)))
        else:
            most = least = asked
        if not least <= ready.sms <= most:
            expected = f"{asked}" if most == least else f"{least} to {most}"
            raise Unproven(f"asked for {sm_percent} % of {self.sms} SMs with {self.backend}, it reads back {ready.sms} SMs, not {expected}")
        if sm_percent == 100:
            return None
        share = 100 * ready.sms / self.sms
        measured = ready.measured_sm_percent
        if not 0 < measured <= share * (1 + _TOLERANCE) + 100 / self.sms:
            raise Unproven(f"it reads back {ready.sms} of {self.sms} SMs ({share:.1f} %), but computes at {measured:.1f} % of the whole GPU")
        if measured < share * (1 - _TOLERANCE):
            return f"it has {share:.1f} % of the SMs and computed at {measured:.1f} % of the whole GPU when it proved it"
        return None


def choose(gpu: Gpu, no_mps: str, asked: str = "auto") -> Limits:
    """How to hold the lanes of this GPU. `no_mps`: why a private MPS daemon does not run, empty if one does; `asked`: auto or a backend's name.

    Unavailable when the backend that was asked for cannot be had: nothing less is taken in its place.
    """
    no_green = _no_green(gpu)
    if asked == Backend.MPS and no_mps:
        raise Unavailable(f"MPS was asked for and cannot be had on {gpu.name}: {no_mps}")
    if asked == Backend.GREEN and no_green:
        raise Unavailable(f"green contexts were asked for and cannot be had on {gpu.name}: {no_green}")
    if asked == Backend.QUOTA:
        return Limits(Backend.QUOTA, gpu.sms, overlap=False, why="quota was asked for")
    if asked == Backend.MPS or (asked == "auto" and not no_mps):
        return Limits(Backend.MPS, gpu.sms, overlap=True, why="a private MPS daemon runs")
    if asked == Backend.GREEN or (asked == "auto" and not no_green):
        step, least = _green_sizes(gpu.capability)
        why = f"green contexts, one lane at a time, for MPS cannot be had: {no_mps}" if no_mps else "green contexts under a private MPS daemon"
        return Limits(Backend.GREEN, gpu.sms, overlap=not no_mps, why=why, step=step, least=least)
    if asked == "auto":
        return Limits(Backend.QUOTA, gpu.sms, overlap=False, why=f"no MPS: {no_mps}; no green contexts: {no_green}")
    raise InvalidValue(f"must be one of {', '.join(SM_BACKENDS)}", key="sm-backend", value=asked)


def first_sm(limits: Limits, sms: int, taken: Sequence[tuple[int, int]]) -> int:
    """Where a new lane's SMs begin so that it shares as few as possible with the lanes that are there: `taken` holds (first, count) of each."""
    if limits.backend is not Backend.GREEN or sms >= limits.sms:
        return 0

    def shared(first: int) -> int:
        return sum(max(0, min(first + sms, start + count) - max(first, start)) for start, count in taken)

    return min(range(0, limits.sms - sms + 1, limits.step), key=lambda first: (shared(first), first))


def _no_green(gpu: Gpu) -> str:
    if gpu.driver < _GREEN_DRIVER:
        return f"they need a driver of CUDA 12.5, this one is of {gpu.driver // 1000}.{gpu.driver % 1000 // 10}"
    if gpu.capability[0] < _GREEN_CAPABILITY:
        return f"they need compute capability 6.0, this GPU has {gpu.capability[0]}.{gpu.capability[1]}"
    return ""


def _green_sizes(capability: tuple[int, int]) -> tuple[int, int]:
    """(step, least) in SMs."""
    if capability[0] >= 9:
        return 8, 8
    return (2, 4) if capability[0] == 8 else (2, 2)
