"""The messages that cross a process boundary on a node: one struct each, told apart by its tag; `frames` makes bytes of them.

Tensors never travel in a message; they lie in shared memory and a message refers to them by offset. File descriptors travel beside the message that
announces them (`FDS` says how many).

Who talks to whom:
    predictor -> agent   Hello (+ its segment), Submit, Cancel            on `agent.sock`
    agent -> predictor   Tokenizer (+ its file), Welcome, FunctionChanged, FunctionGone, Answer, Failed
    control   -> agent   Declare, Remove, SetShare, Grant, GetStatus,     on `control.sock`, one Reply each, matched by `id`;
                         Watch                                            then FunctionChanged too
What the agent and its own processes (slab holders, fork server, lanes) say to each other is in `lane_wire`.

Times are CLOCK_MONOTONIC nanoseconds, which all processes of a node share.
"""

from __future__ import annotations

from typing import ClassVar

import msgspec

from contracts.artifact import Signature
from contracts.functions import Function, Share
from contracts.status import NodeStatus

PROTOCOL_VERSION = 1


class Message(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """What a frame holds. `FDS` file descriptors travel with it."""

    FDS: ClassVar[int] = 0


class TensorRef(msgspec.Struct, frozen=True, array_like=True):
    """A C-contiguous tensor in a segment: Open Inference Protocol dtype, shape, and its place in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class Part(msgspec.Struct, frozen=True, array_like=True):
    """The rows that one client request adds to a batch; its inputs and, reserved by the predictor, the room for its outputs."""

    rows: int
    inputs: tuple[TensorRef, ...]
    outputs: tuple[TensorRef, ...]


class FunctionInfo(msgspec.Struct, frozen=True, array_like=True):
    """What a predictor needs to know of a function. `state` is "loading", "ready" or "failed" (then `reason` says why)."""

    function: Function
    state: str
    reason: str = ""
    signature: Signature | None = None


class Hello(Message, frozen=True):
    """A predictor joins; its segment (a memfd of `segment_bytes`) comes along."""

    FDS: ClassVar[int] = 1
    protocol: int
    segment_bytes: int


class Tokenizer(Message, frozen=True):
    """A tokenizer, in a sealed memfd.

    Comes before the first FunctionInfo of a function that names it; the predictor keeps it as long as the latest of some function does.
    """

    FDS: ClassVar[int] = 1
    name: str


class Welcome(Message, frozen=True):
    """The functions that this predictor owns."""

    functions: tuple[FunctionInfo, ...]


class FunctionChanged(Message, frozen=True):
    """A function of this predictor appeared or changed (state, share, SLO)."""

    info: FunctionInfo


class FunctionGone(Message, frozen=True):
    """A function of this predictor was removed."""

    function: str


class Submit(Message, frozen=True):
    """Run one batch. `id` is the predictor's own and answered exactly once, by Answer or Failed.

    All parts share every dimension but the rows and those that the model pads. `slo_deadline_ns` orders the queue; after `deadline_ns` the answer
    is of no use.
    """

    id: int
    function: str
    parts: tuple[Part, ...]
    slo_deadline_ns: int
    deadline_ns: int


class Cancel(Message, frozen=True):
    """Nobody waits for this batch any more. It is still answered once (Failed, unless its answer was already under way)."""

    id: int


class Answer(Message, frozen=True):
    """The batch ran; its outputs lie where the Submit reserved them.

    `swap_ns`: it waited for weights that were on their way, before it took a lane and on it; `queue_ns`: for anything else until it first took one.
    """

    id: int
    queue_ns: int
    swap_ns: int
    run_ns: int
    cold: bool
    device: str


class Failed(Message, frozen=True):
    """The batch gets no answer: (kind, message, retry_after_ms) as `contracts.errors.to_wire` gives them."""

    id: int
    kind: str
    message: str
    retry_after_ms: int = 0


class Declare(Message, frozen=True):
    """Serve this function; the reply comes when it is ready or has failed."""

    id: int
    function: Function


class Remove(Message, frozen=True):
    """Stop serving this function."""

    id: int
    function: str


class SetShare(Message, frozen=True):
    """Change a function's share, live."""

    id: int
    function: str
    share: Share


class Grant(Message, frozen=True):
    """The process `pid` may use these functions (none listed: all, those to come included)."""

    id: int
    pid: int
    functions: tuple[str, ...] = ()


class GetStatus(Message, frozen=True):
    """Ask for a NodeStatus."""

    id: int


class Watch(Message, frozen=True):
    """From now on this connection is told of every function that appears or changes (FunctionChanged), before whoever changed it gets the Reply."""

    id: int


class Reply(Message, frozen=True):
    """The answer to a control message: an error (kind, message), or the status that was asked for, or neither (done)."""

    id: int
    error: tuple[str, str, int] | None = None
    status: NodeStatus | None = None


ToAgent = Hello | Submit | Cancel
ToPredictor = Tokenizer | Welcome | FunctionChanged | FunctionGone | Answer | Failed
Control = Declare | Remove | SetShare | Grant | GetStatus | Watch
FromControl = Reply | FunctionChanged
