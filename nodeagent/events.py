"""What happens to a node (events) and what it then does (commands): the whole boundary of `NodeState`.

Events come from the shell or from the simulator, commands go back to it. Ids (request, lane, copy) are positive integers; requests are numbered by
the driver, lanes and copies by the state. Times are nanoseconds, memory is bytes.
"""

from __future__ import annotations

import enum

import msgspec

from contracts.functions import FunctionClass, Share, Slo


class Event(msgspec.Struct, frozen=True, gc=False):
    """Something that happened."""


class FunctionSpec(msgspec.Struct, frozen=True):
    """A function as the scheduler sees it. `run_ns` is the first estimate of one row at the whole GPU."""

    key: str
    cls: FunctionClass
    share: Share
    slo: Slo
    weight_bytes: int
    run_ns: int
    max_queue: int = 256


class FunctionDeclared(Event, frozen=True):
    """Its weights lie in host memory; it may be called from now on. The shell has asked `NodeState.refusal` before."""

    spec: FunctionSpec


class FunctionRemoved(Event, frozen=True):
    """It may not be called any more; what is queued is rejected, what runs is answered."""

    function: str


class ShareChanged(Event, frozen=True):
    """A new share, from the next batch on."""

    function: str
    share: Share


class RequestArrived(Event, frozen=True):
    """One batch of `rows` rows that answers `requests` client requests."""

    request: int
    function: str
    rows: int
    requests: int
    slo_deadline_ns: int
    deadline_ns: int


class RequestCancelled(Event, frozen=True):
    """Nobody waits for it any more."""

    request: int


class BatchFinished(Event, frozen=True):
    """A lane answered; `ok` False: the model failed.

    `gpu_ns` were used since it started or was resumed; `swap_ns` is all the time it stood still for weights.
    """

    lane: int
    request: int
    gpu_ns: int
    swap_ns: int
    ok: bool = True


class BatchPaused(Event, frozen=True):
    """A preempted batch stands at a gate; `gpu_ns` since it started or was resumed."""

    lane: int
    request: int
    gpu_ns: int


class CopyProgress(Event, frozen=True):
    """The first `copied_bytes` of a copy have arrived."""

    copy: int
    copied_bytes: int


class LaneUp(Event, frozen=True):
    """A lane has proved its SM cap and serves."""

    lane: int


class LaneLost(Event, frozen=True):
    """A lane has gone, however: killed, crashed, stopped, or never came up."""

    lane: int


class PeerUp(Event, frozen=True):
    """A lane has proved that it can copy weights from another device's memory; how fast, in bytes/s. It holds until that device is lost."""

    lane: int
    device: str
    bytes_per_s: int


class DeviceLost(Event, frozen=True):
    """A device's memory has gone with all that lay there. Its lanes are told to end, and nothing starts there before DeviceUp."""

    device: str


class DeviceUp(Event, frozen=True):
    """A lost device has memory again, empty, of the size that it had. The shell sends it after the last LaneLost of the device's old lanes."""

    device: str


class Tick(Event, frozen=True):
    """Time has passed. `NodeState.next_tick_ns` says when one is needed."""


class Reason(enum.StrEnum):
    """Why a request was rejected; the shell maps each to an error of `contracts.errors`."""

    NO_FUNCTION = "no such function"
    REMOVED = "the function was removed"
    QUEUE_FULL = "the function's queue is full"
    HOPELESS = "no deadline can be met"
    DEADLINE = "the deadline passed while it waited"
    CANCELLED = "cancelled"
    LANE_LOST = "the lane was lost twice, or too late to try again"


class Command(msgspec.Struct, frozen=True, gc=False):
    """Something to do."""


class StartLane(Command, frozen=True):
    """Start a lane; LaneUp or LaneLost follows."""

    lane: int
    device: str
    sm_percent: int
    cls: FunctionClass


class StopLane(Command, frozen=True):
    """End a lane that is idle, or, which takes force, one that hangs, or whose device, or one that it reads, is lost; LaneLost follows."""

    lane: int


class Copy(Command, frozen=True):
    """Copy a function's weights to `offset` of the device's slab, by this lane; the first `until_bytes` at once.

    They come from the host, or, where `source` names another device, from `source_offset` of its slab.
    """

    copy: int
    lane: int
    function: str
    offset: int
    until_bytes: int
    source: str = ""
    source_offset: int = 0


class CopyGrant(Command, frozen=True):
    """The copy may go on to `until_bytes`."""

    copy: int
    lane: int
    until_bytes: int


class Evict(Command, frozen=True):
    """The function's weights on the device are forgotten; their place may be written over."""

    device: str
    function: str


class Run(Command, frozen=True):
    """Run a request's batch. `copy` is the copy to wait for, 0 when the weights are resident."""

    lane: int
    request: int
    function: str
    offset: int
    copy: int
    preemptible: bool


class Preempt(Command, frozen=True):
    """Ask the lane's batch to pause at its next gate. BatchPaused follows, or BatchFinished if it came first."""

    lane: int
    request: int


class Resume(Command, frozen=True):
    """A paused batch goes on."""

    lane: int
    request: int


class Answer(Command, frozen=True):
    """Hand the request's result to whoever asked: `run_ns` of GPU time.

    `swap_ns`: it waited for weights that were on their way, before it took a lane and on it. `queue_ns`: it waited for anything else until it first
    took one.
    """

    request: int
    queue_ns: int
    swap_ns: int
    run_ns: int
    cold: bool
    device: str


class Reject(Command, frozen=True):
    """The request gets no result; `retry_after_ms` is 0 when another try would not help."""

    request: int
    reason: Reason
    retry_after_ms: int = 0
