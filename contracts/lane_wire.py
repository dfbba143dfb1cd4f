"""The messages between the agent and the processes that it starts: slab holders, the fork server and lanes. What they have in common is in `wire`.

Who talks to whom:
    agent -> slab holder Hold
    slab holder -> agent SlabReady                                        CUDA devices only; the CPU device's slab is a memfd of the agent
    agent -> fork server Spawn (+ the lane's two sockets, the slab, the lane page)
    agent -> lane        run channel: MapSegment (+ fd), UnmapSegment, Run, Resume;
                         copy channel: Attach (+ weights), Detach, MapPeer (+ a slab), UnmapPeer, Copy, CopyGrant
    lane -> agent        run channel: LaneReady, BatchDone, BatchPaused;              copy channel: Attached, PeerMapped, CopyProgress
"""

from __future__ import annotations

from typing import ClassVar

import msgspec

from contracts.functions import FunctionClass
from contracts.wire import Message, Part


class Hold(Message, frozen=True):
    """Allocate the slab of a CUDA device, the only one that the holder's environment shows, and keep it until the channel ends.

    `nbytes` 0 means all that is free but `reserve_bytes`, which lanes need for contexts and activations. `cpus` (empty: any) are near the device.
    `seal` is not 0 when lanes of other devices are to read the slab: a pattern made of it lies behind the slab, by which they prove that they can.
    """

    device: str
    nbytes: int
    reserve_bytes: int
    cpus: tuple[int, ...] = ()
    seal: int = 0


class SlabReady(Message, frozen=True):
    """The slab of a CUDA device is there. The holder looks at its context once a second, and ends when that is broken: the slab is then lost.

    `handle` opens the slab in a lane (Spawn.slab_handle). What the holder measured: `h2d_bytes_per_s` of pinned copies, `piece_bytes` (the smallest
    group that copies at that speed), and `whole_ns`, which the occupancy kernel takes on all `sms`.
    """

    device: str
    name: str
    sms: int
    handle: bytes
    nbytes: int
    h2d_bytes_per_s: int
    piece_bytes: int
    whole_ns: int


class Spawn(Message, frozen=True):
    """Fork a lane. Descriptors: run channel, copy channel, slab (CUDA: /dev/null), lane page.

    `link_bytes_per_s` 0 means as fast as it goes; `activation_bytes` bounds what a batch may allocate beside the weights (0: no bound).
    `backend` is what holds the lane to its SMs: "pace" (the CPU device), "mps" (the driver, told by `environment`), "green" (a green context
    that the lane makes), "quota" (nothing: the lane has the whole device). The lane puts `environment` into its own before CUDA starts, and
    then sees one device, its own. On CUDA it has to have `lane_sms` of the device's `sms`; a green context takes them from the `first_sm`-th on,
    where the driver lets it choose. `piece_bytes` and `whole_ns` are the holder's; `cpus` (empty: any) are near the device.
    """

    FDS: ClassVar[int] = 4
    lane: int
    device: str
    sm_percent: int
    cls: FunctionClass
    slab_bytes: int
    threads: int
    link_bytes_per_s: int
    activation_bytes: int
    backend: str = "pace"
    environment: dict[str, str] = msgspec.field(default_factory=dict)
    slab_handle: bytes = b""
    sms: int = 0
    lane_sms: int = 0
    first_sm: int = 0
    piece_bytes: int = 0
    whole_ns: int = 0
    cpus: tuple[int, ...] = ()


class LaneReady(Message, frozen=True):
    """The lane serves; `sm_percent` is the cap it proved.

    On CUDA `sms` is what it read back from its own context, and `measured_sm_percent` what the occupancy kernel found: 100 * whole_ns / its time.
    """

    lane: int
    pid: int
    sm_percent: int
    sms: int = 0
    measured_sm_percent: float = 0.0


class MapSegment(Message, frozen=True):
    """Map a predictor's segment."""

    FDS: ClassVar[int] = 1
    segment: int
    nbytes: int


class UnmapSegment(Message, frozen=True):
    """The predictor has gone; no later Run refers to its segment."""

    segment: int


class Attach(Message, frozen=True):
    """Make a function's module ready to bind. The descriptor is its weight file, `index` its WeightIndex as JSON, `store` the host store's folder."""

    FDS: ClassVar[int] = 1
    function: str
    index: bytes
    store: str


class Attached(Message, frozen=True):
    """The outcome of an Attach; an empty `error` is success. Not `pinned`: the driver would not, and copies of its weights are slow."""

    function: str
    error: str = ""
    pinned: bool = True


class Detach(Message, frozen=True):
    """Forget a function."""

    function: str


class MapPeer(Message, frozen=True):
    """Map another device's slab, so that weights may be copied from it. The descriptor is the slab (CUDA: /dev/null, and `handle` opens it).

    `bytes_per_s` is the speed to keep to, 0: as fast as it goes. On CUDA the pattern that is made of `seal` lies behind the slab's `slab_bytes`: the
    lane reads it, and only one that reads it right may use the slab.
    """

    FDS: ClassVar[int] = 1
    device: str
    slab_bytes: int
    bytes_per_s: int
    handle: bytes = b""
    seal: int = 0


class PeerMapped(Message, frozen=True):
    """The outcome of a MapPeer: how fast copies from there are, or why there will be none (`error`)."""

    device: str
    bytes_per_s: int
    error: str = ""


class UnmapPeer(Message, frozen=True):
    """Another device's slab is lost: no Copy names it before the next MapPeer."""

    device: str


class Copy(Message, frozen=True):
    """Begin to copy a function's weights to `offset` of the slab; the first `until_bytes` may go at once.

    They come from the host, or, where `source` names another device, from `source_offset` of its slab.
    """

    copy: int
    function: str
    offset: int
    until_bytes: int
    source: str = ""
    source_offset: int = 0


class CopyGrant(Message, frozen=True):
    """The copy may go on to `until_bytes`."""

    copy: int
    until_bytes: int


class CopyProgress(Message, frozen=True):
    """The first `copied_bytes` have arrived."""

    copy: int
    copied_bytes: int


class Run(Message, frozen=True):
    """Run one batch with the weights at `offset` of the slab. `copy` is the copy to wait for, 0 when the weights are resident.

    `preemptible`: look at the lane page at every gate, and pause there when it asks for this batch.
    """

    batch: int
    function: str
    offset: int
    copy: int
    segment: int
    parts: tuple[Part, ...]
    preemptible: bool


class Resume(Message, frozen=True):
    """A paused batch goes on."""

    batch: int


class BatchPaused(Message, frozen=True):
    """The batch stands at a gate; `gpu_ns` were used since it started or went on."""

    batch: int
    gpu_ns: int


class BatchDone(Message, frozen=True):
    """The batch ran, or failed (`error`: kind, message).

    `gpu_ns` were used since it started or went on; `swap_ns` is all the time it stood still for weights.
    """

    batch: int
    gpu_ns: int
    swap_ns: int
    error: tuple[str, str] | None = None


ToLaneRun = MapSegment | UnmapSegment | Run | Resume
ToLaneCopy = Attach | Detach | MapPeer | UnmapPeer | Copy | CopyGrant
FromLaneRun = LaneReady | BatchDone | BatchPaused
FromLaneCopy = Attached | PeerMapped | CopyProgress
