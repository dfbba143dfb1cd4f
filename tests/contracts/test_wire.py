import itertools
import typing

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contracts import lane_wire, wire
from contracts.artifact import Signature
from contracts.errors import ProtocolError
from contracts.frames import HEADER_BYTES, MAX_FRAME_BYTES, FrameDecoder, encode
from contracts.functions import Function, FunctionClass, ModelFormat, ModelRef, Share
from contracts.lane_wire import Run
from contracts.wire import Answer, Cancel, Control, Declare, Grant, Hello, Message, Part, SetShare, Submit, TensorRef, ToAgent

FUNCTION = Function("embed", ModelRef(ModelFormat.CATALOG, "minilm"))
PART = Part(2, (TensorRef("x", "FP32", (2, 3), 0, 24),), (TensorRef("y", "FP32", (2,), 64, 8),))
SUBMIT = Submit(7, "default/embed", (PART, PART), 10**12, 2 * 10**12)
UNIONS = (wire.ToAgent, wire.ToPredictor, wire.Control, lane_wire.ToLaneRun, lane_wire.ToLaneCopy, lane_wire.FromLaneRun, lane_wire.FromLaneCopy)
ONE_OF_A_KIND = ["Hold", "Reply", "SlabReady", "Spawn"]
KINDS = Message.__subclasses__()

EXAMPLES = {
    Function: FUNCTION,
    Share: Share(25, 1250, 5000),
    wire.FunctionInfo: wire.FunctionInfo(FUNCTION, "ready", "", Signature((), ())),
    tuple[Part, ...]: (PART,),
    tuple[wire.FunctionInfo, ...]: (wire.FunctionInfo(FUNCTION, "loading"),),
    tuple[str, ...]: ("default/a", "default/b"),
    FunctionClass: FunctionClass.BEST_EFFORT,
    tuple[int, ...]: (0, 5),
    dict[str, str]: {"CUDA_VISIBLE_DEVICES": "GPU-1"},
    int: 5,
    float: 49.5,
    str: "text",
    bytes: b"\x00\xff",
    bool: True,
    tuple[str, str, int] | None: ("Refused", "later", 5),
    tuple[str, str] | None: ("ExecutionError", "no"),
    wire.NodeStatus | None: wire.NodeStatus(1, 2, 3, 4, (), ()),
}


def example(kind):
    hints = typing.get_type_hints(kind)
    return kind(*(EXAMPLES[hints[field]] for field in kind.__struct_fields__))


def frame(body):
    return len(body).to_bytes(HEADER_BYTES, "big") + body


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_message_travels(kind):
    message = example(kind)
    (back,) = FrameDecoder(kind).feed(encode(message))
    assert back == message


def test_every_message_but_those_with_one_sender_and_one_kind_belongs_to_one_direction():
    listed = [kind for union in UNIONS for kind in typing.get_args(union)]
    assert sorted(kind.__name__ for kind in KINDS if kind not in listed) == ONE_OF_A_KIND
    assert len(listed) == len(set(listed))


def test_tags_are_distinct_so_that_no_message_is_taken_for_another():
    tags = [kind.__struct_config__.tag for kind in KINDS]
    assert len(tags) == len(set(tags))


STREAM = [Hello(1, 4096), SUBMIT, Cancel(7), Submit(8, "default/x", (), 1, 2)]
BYTES = b"".join(map(encode, STREAM))


@pytest.mark.parametrize("cut", range(len(BYTES) + 1))
def test_a_stream_may_be_split_at_any_place(cut):
    decoder = FrameDecoder(ToAgent)
    assert [*decoder.feed(BYTES[:cut]), *decoder.feed(BYTES[cut:])] == STREAM


@given(st.lists(st.integers(0, len(BYTES)), max_size=12))
def test_a_stream_may_come_in_any_pieces(cuts):
    at = [0, *sorted(cuts), len(BYTES)]
    decoder = FrameDecoder(ToAgent)
    assert [message for start, end in itertools.pairwise(at) for message in decoder.feed(BYTES[start:end])] == STREAM


def test_a_truncated_frame_gives_nothing_and_is_kept():
    decoder = FrameDecoder(ToAgent)
    assert list(decoder.feed(encode(SUBMIT)[:-1])) == []
    assert list(decoder.feed(encode(SUBMIT)[-1:])) == [SUBMIT]


def test_the_longest_frame_is_taken_and_a_longer_one_is_not_even_read():
    room = MAX_FRAME_BYTES - len(encode(Grant(1, 2, ("",)))) + HEADER_BYTES
    longest = Grant(1, 2, ("x" * (room - 4),))
    assert list(FrameDecoder(Control).feed(encode(longest))) == [longest]
    with pytest.raises(ProtocolError, match="longer than"):
        list(FrameDecoder(Control).feed((MAX_FRAME_BYTES + 1).to_bytes(HEADER_BYTES, "big")))


def test_a_message_too_long_for_a_frame_is_refused_by_its_sender():
    with pytest.raises(ProtocolError, match=r"a Grant of \d+ bytes is longer"):
        encode(Grant(1, 2, ("x" * MAX_FRAME_BYTES,)))


def _with(message, **values):
    """A message's body with some of its fields replaced by values that its type would not take."""
    fields = [type(message).__struct_config__.tag, *(values.get(name, getattr(message, name)) for name in message.__struct_fields__)]
    return msgspec.msgpack.encode(fields)


HOSTILE = {
    "an empty body": b"",
    "no MessagePack": b"\xc1",
    "a number": msgspec.msgpack.encode(5),
    "an empty list": msgspec.msgpack.encode([]),
    "an unknown tag": msgspec.msgpack.encode(["Shutdown", 1]),
    "a message of another direction": encode(Answer(1, 0, 0, 0, False, "cpu:0"))[HEADER_BYTES:],
    "a message of the lanes": encode(Run(1, "f", 0, 0, 0, (), False))[HEADER_BYTES:],
    "too few fields": msgspec.msgpack.encode(["Submit", 1]),
    "bytes after the message": encode(Cancel(1))[HEADER_BYTES:] + b"\x00",
    "text where a number belongs": _with(SUBMIT, id="1"),
    "a fraction where a number belongs": _with(SUBMIT, deadline_ns=1.5),
    "no text where text belongs": _with(SUBMIT, function=None),
    "bytes that are no UTF-8": encode(SUBMIT)[HEADER_BYTES:].replace(b"embed", b"\xff\xfe\xfd\xfc\xfb"),
    "a list of more items than there are bytes": msgspec.msgpack.encode("Submit").join([b"\x96", b"\x01\xa1x\xdd\xff\xff\xff\xff"]),
    "deep nesting in a field that is too many": msgspec.msgpack.encode(["Cancel", 1])[1:].join([b"\x93", b"\x91" * 100_000 + b"\x00"]),
    "deep nesting in a field": _with(SUBMIT, parts=0)[:-1],
}


@pytest.mark.parametrize("body", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_frame_is_a_protocol_error(body):
    with pytest.raises(ProtocolError):
        list(FrameDecoder(ToAgent).feed(frame(body)))


BAD_VALUES = {
    "a share of no SMs": _with(SetShare(1, "default/f", Share()), share={"sm_percent": 0, "quota_bp": 1, "limit_bp": 1}),
    "a function whose name is a path": _with(Declare(1, FUNCTION), function={"name": "../x", "model": {"format": "safetensors", "source": "s"}}),
    "a function of an unknown class": _with(
        Declare(1, FUNCTION), function={"name": "x", "model": {"format": "safetensors", "source": "s"}, "cls": "vip"}
    ),
    "a function of an unknown format": _with(Declare(1, FUNCTION), function={"name": "x", "model": {"format": "pickle", "source": "s"}}),
}


@pytest.mark.parametrize("body", BAD_VALUES.values(), ids=BAD_VALUES)
def test_a_bad_value_in_a_frame_is_a_protocol_error(body):
    with pytest.raises(ProtocolError):
        list(FrameDecoder(Control).feed(frame(body)))


@pytest.mark.parametrize("before", [b"", encode(Cancel(1))[:3]], ids=["whole frames", "a frame that came in pieces"])
def test_a_bad_frame_among_good_ones_is_an_error(before):
    decoder = FrameDecoder(ToAgent)
    assert decoder.feed(before) == []
    with pytest.raises(ProtocolError):
        decoder.feed(encode(Cancel(1))[len(before) :] + frame(b"\xc1") + encode(Cancel(2)))


@given(st.binary(max_size=300))
def test_random_bytes_are_nothing_but_a_protocol_error(data):
    for union in UNIONS:
        try:
            list(FrameDecoder(union).feed(frame(data)))
            list(FrameDecoder(union).feed(data))
        except ProtocolError:
            pass


@settings(max_examples=300)
@given(st.sampled_from([*STREAM, Declare(1, FUNCTION), SetShare(1, "default/f", Share())]), st.integers(0, 10_000), st.integers(1, 255))
def test_one_flipped_byte_gives_a_typed_message_or_a_protocol_error(message, at, flip):
    body = bytearray(encode(message)[HEADER_BYTES:])
    body[at % len(body)] ^= flip
    try:
        found = list(FrameDecoder(ToAgent | Control).feed(frame(bytes(body))))
    except ProtocolError:
        return
    assert [type(one) for one in found] != []
    assert all(list(FrameDecoder(type(one)).feed(encode(one))) == [one] for one in found)
