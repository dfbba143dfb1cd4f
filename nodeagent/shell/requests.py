"""A request as the shell keeps it (the state knows only its id), and the checks that a Submit passes before it becomes one.

Never sends anything and keeps no table.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from contracts.artifact import DTYPE_BYTES, Signature
from contracts.errors import DeadlineExceeded, InvalidTensor, NotFound, Refused, SluiceError, Unavailable
from contracts.wire import Part, Submit, TensorRef
from nodeagent.events import Reason

if TYPE_CHECKING:
    from nodeagent.shell.functions import Entry
    from nodeagent.shell.peers import Peer
    from nodeagent.shell.segments import Segment

KINDS: Mapping[Reason, type[SluiceError]] = {
    Reason.NO_FUNCTION: NotFound,
    Reason.REMOVED: NotFound,
    Reason.QUEUE_FULL: Refused,
    Reason.HOPELESS: Refused,
    Reason.DEADLINE: DeadlineExceeded,
    Reason.CANCELLED: Unavailable,
    Reason.LANE_LOST: Unavailable,
}
"""What a predictor is told for each reason to reject."""


class Request:
    """A Submit that was accepted, until it is answered. `error` is the model's own (kind, message), if it failed."""

    __slots__ = ("arrived_ns", "entry", "error", "id", "peer", "segment", "submit")

    def __init__(self, number: int, submit: Submit, entry: Entry, peer: Peer, segment: Segment, arrived_ns: int) -> None:
        self.id = number
        self.submit = submit
        self.entry = entry
        self.peer = peer
        self.segment = segment
        self.arrived_ns = arrived_ns
        self.error: tuple[str, str] | None = None


def count_rows(submit: Submit, signature: Signature, max_batch: int, segment_bytes: int) -> int:
    """The rows of a batch whose every tensor fits the signature and lies inside the segment; InvalidTensor names what does not."""
    parts = submit.parts
    if not parts:
        raise InvalidTensor("a batch needs at least one part", key="parts", value=len(parts))
    rows = parts[0].rows
    shared = _check_part(parts[0], signature, segment_bytes)
    for part in parts[1:]:
        rows += part.rows
        if _check_part(part, signature, segment_bytes) != shared:
            raise InvalidTensor(
                "all parts of a batch must agree in every dimension but the rows and those that are padded", key="parts", value=part.rows
            )
    if len(parts) > 1 and (rows > max_batch or not signature.batchable):
        raise InvalidTensor(f"may not join {len(parts)} parts (batch at most {max_batch if signature.batchable else 1})", key="rows", value=rows)
    return rows


def _check_part(part: Part, signature: Signature, segment_bytes: int) -> dict[str, int]:
    """Checks one part; returns the sizes of its named dimensions in which all parts must agree."""
    sizes = signature.bind({ref.name: (ref.dtype, ref.shape) for ref in part.inputs})
    rows = sizes.get("batch", part.rows) if signature.batchable else part.rows
    if part.rows != rows or rows < 1:
        raise InvalidTensor(f"must be the rows of its tensors ({rows})", key="rows", value=part.rows)
    if len(part.inputs) != len(signature.inputs):
        raise InvalidTensor("an input stands twice", key="inputs", value=[ref.name for ref in part.inputs])
    for ref in part.inputs:
        _check_place(ref, segment_bytes)
    outputs = {ref.name: ref for ref in part.outputs}
    expected = signature.output_shapes(sizes)
    if len(part.outputs) != len(expected):
        raise InvalidTensor("needs room for each output once", key="outputs", value=[ref.name for ref in part.outputs])
    for spec, shape, nbytes in expected:
        room = outputs.get(spec.name)
        if room is None or room.dtype != spec.dtype or room.shape != shape or room.nbytes != nbytes:
            raise InvalidTensor(f"needs room for {spec.dtype} {list(shape)}", key=spec.name, value=room)
        _check_place(room, segment_bytes)
    for dim in ("batch", *signature.padded):
        sizes.pop(dim, None)
    return sizes


def _check_place(ref: TensorRef, segment_bytes: int) -> None:
    width = DTYPE_BYTES[ref.dtype]
    if ref.nbytes != math.prod(ref.shape) * width:
        raise InvalidTensor(f"{list(ref.shape)} of {ref.dtype} takes {math.prod(ref.shape) * width} bytes", key=ref.name, value=ref.nbytes)
    if ref.offset < 0 or ref.offset % width or ref.offset + ref.nbytes > segment_bytes:
        raise InvalidTensor(f"must lie aligned inside the segment of {segment_bytes} bytes", key=ref.name, value=ref.offset)


def check_signature(signature: Signature) -> None:
    """InvalidTensor unless every output's size follows from the inputs, so that a predictor can reserve room for it."""
    named = {dim for spec in signature.inputs for dim in spec.shape if isinstance(dim, str)}
    for spec in (*signature.inputs, *signature.outputs):
        if spec.dtype not in DTYPE_BYTES:
            raise InvalidTensor("is no datatype of the protocol", key=spec.name, value=spec.dtype)
    for spec in signature.outputs:
        unknown = [dim for dim in spec.shape if isinstance(dim, str) and dim not in named]
        if unknown:
            raise InvalidTensor("its size does not follow from the inputs", key=spec.name, value=unknown)
