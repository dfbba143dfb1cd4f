"""Predictors that lie, stutter or shout at a real agent: an error for the sender, nothing for the others, nothing left behind."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import socket
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec
import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contracts import wire
from contracts.channel import Channel, connect
from contracts.functions import Share
from contracts.wire import MAX_FRAME_BYTES, PROTOCOL_VERSION, Answer, Cancel, Failed, Hello, Part, Submit, TensorRef, encode
from tests.faults.real import Predictor, function, rows_of, source
from tests.hostile.conftest import Scene

SEGMENT = 1 << 20
FUTURE_WRITE = 0x10
"""F_SEAL_FUTURE_WRITE of linux/fcntl.h."""
MANY = settings(max_examples=150)


def _ref(index: int, side: str, **changes: object) -> Callable[[Submit], Submit]:
    """Spoils one tensor of the first part."""

    def spoil(batch: Submit) -> Submit:
        refs = list(getattr(batch.parts[0], side))
        refs[index] = msgspec.structs.replace(refs[index], **changes)
        return msgspec.structs.replace(batch, parts=(msgspec.structs.replace(batch.parts[0], **{side: tuple(refs)}),))

    return spoil


def _field(**changes: object) -> Callable[[Submit], Submit]:
    return lambda batch: msgspec.structs.replace(batch, **changes)


def _part(**changes: object) -> Callable[[Submit], Submit]:
    return lambda batch: msgspec.structs.replace(batch, parts=(msgspec.structs.replace(batch.parts[0], **changes),))


WRONG: dict[str, tuple[Callable[[Submit], Submit], str]] = {
    "another's function": (_field(function="default/others"), "NotPermitted"),
    "a granted name without a function": (_field(function="default/ghost"), "NotFound"),
    "a path": (_field(function="../../../etc/passwd"), "NotPermitted"),
    "a path behind a granted name": (_field(function="default/mine/../others"), "NotPermitted"),
    "a granted name and a NUL": (_field(function="default/mine\0"), "NotPermitted"),
    "the name that lanes use": (_field(function="default/mine@1"), "NotPermitted"),
    "no name": (_field(function=""), "NotPermitted"),
    "a name of a million characters": (_field(function="x" * 1_000_000), "NotPermitted"),
    "an input at -1": (_ref(0, "inputs", offset=-1), "InvalidTensor"),
    "an input at the least number": (_ref(0, "inputs", offset=-(2**63)), "InvalidTensor"),
    "an input at the largest number": (_ref(0, "inputs", offset=2**64 - 1), "InvalidTensor"),
    "an input whose end overflows": (_ref(0, "inputs", offset=2**63 - 32), "InvalidTensor"),
    "an input one byte beyond the segment": (_ref(0, "inputs", offset=SEGMENT - 60), "InvalidTensor"),
    "an input at an odd place": (_ref(0, "inputs", offset=1), "InvalidTensor"),
    "an input of too few bytes": (_ref(0, "inputs", nbytes=63), "InvalidTensor"),
    "an input of too many bytes": (_ref(0, "inputs", nbytes=65), "InvalidTensor"),
    "an input of negative bytes": (_ref(0, "inputs", nbytes=-64), "InvalidTensor"),
    "an input of no rows": (_ref(0, "inputs", shape=(0, 16), nbytes=0), "InvalidTensor"),
    "an input of negative rows": (_ref(0, "inputs", shape=(-1, -16)), "InvalidTensor"),
    "a shape whose product overflows": (_ref(0, "inputs", shape=(2**62, 16), nbytes=0), "InvalidTensor"),
    "a shape of a thousand dimensions": (_ref(0, "inputs", shape=(1,) * 1000), "InvalidTensor"),
    "another rank": (_ref(0, "inputs", shape=(16,)), "InvalidTensor"),
    "another width": (_ref(0, "inputs", shape=(2, 8)), "InvalidTensor"),
    "another datatype of the same size": (_ref(0, "inputs", dtype="INT32"), "InvalidTensor"),
    "a datatype that there is not": (_ref(0, "inputs", dtype="\0"), "InvalidTensor"),
    "an input of another name": (_ref(0, "inputs", name="../features"), "InvalidTensor"),
    "an output over the end": (_ref(0, "outputs", offset=SEGMENT - 8), "InvalidTensor"),
    "an output before the beginning": (_ref(0, "outputs", offset=-16), "InvalidTensor"),
    "an output at an odd place": (_ref(0, "outputs", offset=2), "InvalidTensor"),
    "an output of another size": (_ref(0, "outputs", nbytes=8), "InvalidTensor"),
    "an output of another shape": (_ref(0, "outputs", shape=(4, 1)), "InvalidTensor"),
    "an output of another datatype": (_ref(0, "outputs", dtype="INT32"), "InvalidTensor"),
    "no inputs": (_part(inputs=()), "InvalidTensor"),
    "no outputs": (_part(outputs=()), "InvalidTensor"),
    "no rows": (_part(rows=0), "InvalidTensor"),
    "negative rows": (_part(rows=-1), "InvalidTensor"),
    "more rows than the tensors": (_part(rows=2**63), "InvalidTensor"),
    "no parts": (_field(parts=()), "InvalidTensor"),
    "more parts than the function joins": (lambda batch: msgspec.structs.replace(batch, parts=batch.parts * 1000), "InvalidTensor"),
    "a deadline long past": (_field(deadline_ns=1, slo_deadline_ns=1), "Refused"),
    "a deadline before time began": (_field(deadline_ns=-(2**63), slo_deadline_ns=-(2**63)), "Refused"),
}


@pytest.mark.parametrize(("spoil", "kind"), WRONG.values(), ids=WRONG)
def test_a_wrong_submit_fails_alone(spoil: Callable[[Submit], Submit], kind: str, scene: Scene) -> None:
    hostile = Predictor(scene.agent.run_dir, SEGMENT)
    batch = spoil(hostile.batch("default/mine", rows_of(1)))
    hostile.channel.send(batch)
    outcome = hostile.outcome(batch)
    assert isinstance(outcome, Failed)
    assert outcome.kind == kind
    assert len(outcome.message) < 1000
    assert hostile.serves("default/mine", source(1)), "its connection goes on"
    hostile.close()
    scene.undisturbed()


EXTREMES: dict[str, dict[str, int]] = {
    "deadlines at the largest number": {"deadline_ns": 2**63 - 1, "slo_deadline_ns": 2**63 - 1},
    "deadlines beyond 63 bits": {"deadline_ns": 2**64 - 1, "slo_deadline_ns": 2**64 - 1},
    "an SLO before time began": {"slo_deadline_ns": -(2**63)},
    "an SLO behind the deadline": {"slo_deadline_ns": 2**63},
}


@pytest.mark.parametrize("fields", EXTREMES.values(), ids=EXTREMES)
def test_extreme_deadlines_harm_nobody(fields: dict[str, int], scene: Scene) -> None:
    hostile = Predictor(scene.agent.run_dir, SEGMENT)
    for _ in range(20):
        batch = _field(**fields)(hostile.batch("default/mine", rows_of(2)))
        hostile.channel.send(batch)
        assert hostile.check(batch, source(1))
    hostile.close()
    scene.undisturbed()


@pytest.mark.parametrize("number", [0, -1, -(2**63), 2**63 - 1, 2**63, 2**64 - 1])
def test_ids_are_the_senders_own_and_come_back_as_they_were(number: int, scene: Scene) -> None:
    hostile = Predictor(scene.agent.run_dir, SEGMENT)
    for _ in range(2):
        batch = _field(id=number)(hostile.batch("default/mine", rows_of(3)))
        hostile.channel.send(batch)
        assert hostile.check(batch, source(1))
        del hostile.outcomes[number]
    hostile.close()
    scene.undisturbed()


def test_cancelling_what_is_a_strangers_or_nobodys_changes_nothing(scene: Scene) -> None:
    hostile = Predictor(scene.agent.run_dir, SEGMENT)
    for number in [*range(-1, 2000), 2**63, 2**64 - 1]:
        hostile.channel.send(Cancel(number))
    assert hostile.serves("default/mine", source(1))
    scene.undisturbed()
    hostile.close()


def test_a_cancelled_batch_has_one_outcome_however_often_it_is_cancelled(scene: Scene) -> None:
    hostile = Predictor(scene.agent.run_dir, SEGMENT)
    batches = [hostile.submit("default/mine", rows_of(number)) for number in range(50)]
    for batch in reversed(batches):
        hostile.channel.send(Cancel(batch.id))
        hostile.channel.send(Cancel(batch.id))
    for batch in batches:
        hostile.check(batch, source(1))
    assert hostile.serves("default/mine", source(1))
    hostile.close()
    scene.undisturbed()


# What breaks the protocol.


def memfd(nbytes: int = SEGMENT, flags: int = os.MFD_ALLOW_SEALING) -> int:
    fd = os.memfd_create("sluice-segment", flags)
    os.ftruncate(fd, nbytes)
    return fd


def _pipe() -> int:
    read, write = os.pipe()
    os.close(write)
    return read


def _file(mode: int = os.O_RDWR) -> int:
    fd = os.open("/dev/shm", os.O_TMPFILE | mode)
    os.ftruncate(fd, SEGMENT)
    return fd


def _read_only() -> int:
    fd = memfd()
    again = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    os.close(fd)
    return again


def _sealed(seals: int) -> int:
    fd = memfd()
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def _read_only_and_sealed() -> int:
    fd = _sealed(fcntl.F_SEAL_SHRINK)
    again = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    os.close(fd)
    return again


HELLO = encode(Hello(PROTOCOL_VERSION, SEGMENT))
REF = TensorRef("features", "FP32", (1, 16), 0, 64)
SUBMIT = encode(Submit(1, "default/others", (), 0, 0))
Frame = tuple[bytes, Iterable[Callable[[], int]]]


def _foreign(message: wire.Message) -> list[Frame]:
    """A message that is none of agent.sock, after a proper Hello; with the descriptors that it announces."""
    return [(HELLO, [memfd]), (encode(message), [memfd] * message.FDS)]


SHARE = Share(10, 10)
SPAWN = wire.Spawn(1, "cpu:0", 100, function("x", "mlp").cls, SEGMENT, 1, 0, 0)
BREAKS: dict[str, list[Frame]] = {
    "a Submit before the Hello": [(SUBMIT, [])],
    "two Hellos": [(HELLO, [memfd]), (HELLO, [memfd])],
    "a Hello without its segment": [(HELLO, [])],
    "a Hello with a pipe": [(HELLO, [_pipe])],
    "a Hello with a file": [(HELLO, [_file])],
    "a Hello with a socket": [(HELLO, [lambda: socket.socket().detach()])],
    "a Hello with a folder": [(HELLO, [lambda: os.open("/", os.O_RDONLY)])],
    "a Hello with a device": [(HELLO, [lambda: os.open("/dev/zero", os.O_RDWR)])],
    "a segment that can shrink": [(HELLO, [lambda: memfd(flags=0)])],
    "a segment that is read-only": [(HELLO, [_read_only])],
    "a segment that is read-only and sealed": [(HELLO, [_read_only_and_sealed])],
    "a segment sealed against writing": [(HELLO, [lambda: _sealed(fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_WRITE)])],
    "a segment sealed against new mappings": [(HELLO, [lambda: _sealed(fcntl.F_SEAL_SHRINK | FUTURE_WRITE)])],
    "a segment sealed too early": [(HELLO, [lambda: _sealed(fcntl.F_SEAL_SEAL)])],
    "a segment one byte too small": [(HELLO, [lambda: memfd(SEGMENT - 1)])],
    "an empty segment": [(HELLO, [lambda: memfd(0)])],
    "a segment of no bytes": [(encode(Hello(PROTOCOL_VERSION, 0)), [memfd])],
    "a segment of negative size": [(encode(Hello(PROTOCOL_VERSION, -1)), [memfd])],
    "a segment of all memory": [(encode(Hello(PROTOCOL_VERSION, 2**64 - 1)), [memfd])],
    "another protocol": [(encode(Hello(2**63, SEGMENT)), [memfd])],
    "more descriptors than a frame may have": [(HELLO, [memfd] * 40)],
    "descriptors that nobody announced": [(HELLO, [memfd] * 16), (SUBMIT, [memfd] * 16)],
    "descriptors with half a frame": [(HELLO[:3], [memfd] * 16), (b"", [memfd] * 8)],
    "the same id twice": [(HELLO, [memfd]), (b"TWICE", [])],
    "a frame one byte too long": [((MAX_FRAME_BYTES + 1).to_bytes(4, "big"), [])],
    "a frame of 4 GiB": [(b"\xff\xff\xff\xff", [])],
    "an empty frame": [(b"\0\0\0\0", [])],
    "noise": [(b"\0\0\0\x08\xc1\xff\0\x93\xc1\xc1\xc1\xc1", [])],
    "deep nesting": [((100_000).to_bytes(4, "big") + b"\x91" * 100_000, [])],
    "a string that is no text": [(b"\0\0\0\x05\x92\xa2\xff\xfe\x01", [])],
    "an array that says it has 4 billion items": [(b"\0\0\0\x05\xdd\xff\xff\xff\xff", [])],
    "a string that says it has 4 billion bytes": [(b"\0\0\0\x05\xdb\xff\xff\xff\xff", [])],
    "HTTP": [(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", [])],
    "a control message: Declare": _foreign(wire.Declare(1, function("evil", "mlp"))),
    "a control message: Remove": _foreign(wire.Remove(1, "default/mine")),
    "a control message: Grant": _foreign(wire.Grant(1, os.getpid(), ())),
    "a control message: SetShare": _foreign(wire.SetShare(1, "default/mine", SHARE)),
    "a control message: GetStatus": _foreign(wire.GetStatus(1)),
    "a lane's message: BatchDone": _foreign(wire.BatchDone(1, 0, 0)),
    "a lane's message: BatchPaused": _foreign(wire.BatchPaused(1, 0)),
    "a lane's message: LaneReady": _foreign(wire.LaneReady(1, os.getpid(), 100)),
    "a lane's message: CopyProgress": _foreign(wire.CopyProgress(1, 1)),
    "a lane's message: Attached": _foreign(wire.Attached("default/mine@1", "broken")),
    "the agent's message: Run": _foreign(wire.Run(1, "default/mine", 0, 0, 1, (), False)),
    "the agent's message: MapSegment": _foreign(wire.MapSegment(1, SEGMENT)),
    "the agent's message: Attach": _foreign(wire.Attach("default/mine", b"{}", "/")),
    "the agent's message: Spawn": _foreign(SPAWN),
    "the agent's message: Answer": _foreign(wire.Answer(1, 0, 0, 0, False, "cpu:0")),
    "the agent's message: Welcome": _foreign(wire.Welcome(())),
}


def _send(sock: socket.socket, data: bytes, makers: Iterable[Callable[[], int]]) -> None:
    fds = [make() for make in makers]
    try:
        for at in range(0, max(len(fds), 1), 200):
            if fds:
                sent = socket.send_fds(sock, [data or b"\0"], fds[at : at + 200])
                sock.sendall(data[sent:])
            else:
                sock.sendall(data)
    finally:
        for fd in fds:
            os.close(fd)


def _drain(sock: socket.socket) -> None:
    """Returns when the agent has closed the connection."""
    sock.settimeout(60)
    with contextlib.suppress(ConnectionResetError, BrokenPipeError):
        while sock.recv(1 << 16):
            pass


@pytest.mark.parametrize("frames", BREAKS.values(), ids=BREAKS)
def test_a_broken_protocol_closes_the_sender_alone(frames: list[Frame], scene: Scene) -> None:
    batch = encode(Submit(1, "default/mine", (Part(1, (REF,), (TensorRef("scores", "FP32", (1, 4), 64, 16),)),), 2**62, 2**62))
    with connect(scene.path) as sock:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for data, makers in frames:
                _send(sock, batch * 2 if data == b"TWICE" else data, makers)
        _drain(sock)
    scene.undisturbed()
    assert {each.key for each in scene.control.status().functions} == {"default/mine", "default/others"}


def test_a_million_parts_fit_no_frame_and_many_empty_ones_are_refused(scene: Scene) -> None:
    """A frame holds about 4 MiB: the most parts that fit are refused at once, more of them close the sender."""
    hostile = Predictor(scene.agent.run_dir, SEGMENT)
    batch = hostile.batch("default/mine", rows_of(1))
    crowded = msgspec.structs.replace(batch, parts=(Part(1, (), ()),) * 1_000_000)
    hostile.channel.send(crowded)
    assert isinstance(hostile.outcome(crowded), Failed)
    hostile.close()
    with connect(scene.path) as sock, contextlib.suppress(BrokenPipeError, ConnectionResetError):
        body = msgspec.msgpack.encode(msgspec.structs.replace(batch, parts=batch.parts * 1_000_000))
        sock.sendall(len(body).to_bytes(4, "big") + body[: 1 << 20])
        _drain(sock)
    scene.undisturbed()


def test_frames_cut_off_at_every_byte_leave_nothing(scene: Scene) -> None:
    frames = HELLO + encode(Submit(1, "default/mine", (Part(1, (REF,), (REF,)),), 0, 0))
    for end in range(1, len(frames)):
        with connect(scene.path) as sock:
            fd = memfd()
            socket.send_fds(sock, [frames[:end]], [fd])
            os.close(fd)
    scene.undisturbed()


def test_frames_that_come_byte_by_byte_are_understood(scene: Scene) -> None:
    slow = Predictor(scene.agent.run_dir, SEGMENT)
    batch = slow.batch("default/mine", rows_of(1))
    for byte in encode(batch):
        slow.channel._sock.sendall(bytes([byte]))
    assert slow.check(batch, source(1))
    slow.close()
    scene.undisturbed()


def test_a_thousand_connections_opened_and_dropped_leave_no_memory(scene: Scene) -> None:
    agent = psutil.Process(scene.agent.process.pid)
    _connect_and_drop(scene, 200)
    scene.undisturbed()
    held = agent.memory_info().rss
    _connect_and_drop(scene, 1000)
    scene.undisturbed()
    assert agent.memory_info().rss - held < 8 << 20


def _connect_and_drop(scene: Scene, count: int) -> None:
    for number in range(count):
        with connect(scene.path) as sock:
            if number % 2:
                _send(sock, HELLO, [memfd])
            if number % 4 == 3:
                sock.sendall(SUBMIT[: number % len(SUBMIT)])


def test_many_silent_connections_at_once_keep_nobody_out(scene: Scene) -> None:
    with contextlib.ExitStack() as stack:
        for number in range(500):
            sock = stack.enter_context(connect(scene.path))
            if number % 2:
                _send(sock, HELLO, [memfd])
        scene.undisturbed()
        late = Predictor(scene.agent.run_dir, SEGMENT)
        assert late.serves("default/mine", source(1))
        late.close()


def test_a_peer_that_never_reads_is_cut_off(scene: Scene) -> None:
    with connect(scene.path) as sock:
        _send(sock, HELLO, [memfd])
        sock.settimeout(120)
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            _send_for_ever(sock, SUBMIT * 2000)
    scene.undisturbed()


def _send_for_ever(sock: socket.socket, data: bytes) -> None:
    while True:
        sock.sendall(data)


def test_outputs_over_another_batchs_inputs_hurt_only_their_owner(scene: Scene) -> None:
    """A predictor may spoil its own memory as it likes, while lanes read and write there."""
    hostile = Predictor(scene.agent.run_dir, SEGMENT)
    stop = threading.Event()

    def scribble() -> None:
        while not stop.is_set():
            hostile.memory[:4096] = os.urandom(4096)

    scribbler = threading.Thread(target=scribble)
    scribbler.start()
    for _ in range(50):
        batch = _part(outputs=(TensorRef("scores", "FP32", (1, 4), 0, 16),), inputs=(TensorRef("features", "FP32", (1, 16), 0, 64),))(
            hostile.batch("default/mine", rows_of(1))
        )
        hostile.channel.send(batch)
        assert isinstance(hostile.outcome(batch), Answer)
    stop.set()
    scribbler.join()
    hostile.close()
    scene.undisturbed()


def test_a_segment_cannot_be_cut_short_or_closed_under_a_lane(scene: Scene) -> None:
    hostile = Predictor(scene.agent.run_dir, SEGMENT)
    assert hostile.serves("default/mine", source(1))
    for harm in (lambda: os.ftruncate(hostile.fd, 4096), lambda: fcntl.fcntl(hostile.fd, fcntl.F_ADD_SEALS, FUTURE_WRITE)):
        with pytest.raises(PermissionError):
            harm()
    assert hostile.serves("default/mine", source(1))
    hostile.close()


def test_a_segment_that_no_lane_can_map_fails_its_owner_alone(scene: Scene) -> None:
    """Larger than the address space, which costs the sender nothing: the memory is sparse."""
    lanes = {process.pid for process in scene.agent.processes("lane")}
    nbytes = 1 << 50
    fd = memfd(nbytes)
    with connect(scene.path) as sock:
        channel = Channel(sock, wire.ToPredictor)
        channel.send(Hello(PROTOCOL_VERSION, nbytes), [fd])
        os.close(fd)
        part = Part(1, (REF,), (TensorRef("scores", "FP32", (1, 4), 64, 16),))
        channel.send(Submit(1, "default/mine", (part,), 2**62, 2**62))
        while not isinstance(outcome := channel.receive(), tuple) or not isinstance(outcome[0], Answer | Failed):
            assert outcome is not None, "the agent closed the connection"
        assert isinstance(outcome[0], Failed)
    scene.undisturbed()
    assert {process.pid for process in scene.agent.processes("lane")} == lanes


# hypothesis: any frames in any order.

INTS = st.one_of(st.integers(-2, 40), st.integers(-(2**63), 2**64 - 1))
NAMES = st.sampled_from(["default/mine", "default/others", "default/ghost", "", "../mine", "default/mine\0", "mine"])
TENSORS = st.builds(
    TensorRef,
    st.sampled_from(["features", "scores", "", "../features"]),
    st.sampled_from(["FP32", "INT32", "FP64", "BYTES", ""]),
    st.one_of(st.just((1, 16)), st.just((1, 4)), st.lists(INTS, max_size=4).map(tuple)),
    st.one_of(st.sampled_from([0, 64, 128, SEGMENT - 64]), INTS),
    st.one_of(st.sampled_from([64, 16]), INTS),
)
PARTS = st.builds(Part, st.one_of(st.just(1), INTS), st.lists(TENSORS, max_size=2).map(tuple), st.lists(TENSORS, max_size=2).map(tuple))
SUBMITS = st.builds(Submit, st.integers(0, 6), NAMES, st.lists(PARTS, max_size=3).map(tuple), INTS, INTS)
GOOD = st.builds(
    Submit,
    st.integers(0, 6),
    st.just("default/mine"),
    st.just((Part(1, (REF,), (TensorRef("scores", "FP32", (1, 4), 64, 16),)),)),
    st.just(2**62),
    st.just(2**62),
)
MESSAGES = st.one_of(GOOD, SUBMITS, st.builds(Cancel, st.integers(0, 6)))


@MANY
@given(st.lists(MESSAGES, max_size=12))
def test_any_submits_and_cancels_in_any_order_are_answered_once_each(scene: Scene, messages: list[Submit | Cancel]) -> None:
    """Until the sender repeats an id that is not answered yet: then it may be closed."""
    hostile = Predictor(scene.agent.run_dir, SEGMENT)
    hostile.memory[:64] = np.ones(16, "<f4").tobytes()
    hostile.ids = itertools.count(1000)
    sent: list[int] = []
    for message in messages:
        if isinstance(message, Submit) and message.id in sent:
            continue
        if isinstance(message, Submit):
            sent.append(message.id)
        hostile.channel.send(message)
    while len(hostile.outcomes) < len(sent):
        assert hostile.receive(), "the agent closed a predictor that kept to the protocol"
    assert hostile.serves("default/mine", source(1)), "and nothing more comes of the old ids"
    hostile.close()


BYTES = st.one_of(
    st.binary(max_size=64),
    st.binary(max_size=64).map(lambda body: len(body).to_bytes(4, "big") + body),
    MESSAGES.map(encode),
    st.just(HELLO),
)


@MANY
@given(st.lists(st.tuples(BYTES, st.integers(0, 3)), min_size=1, max_size=8), st.sampled_from(["agent.sock", "control.sock"]))
def test_any_bytes_with_any_descriptors_harm_nobody(scene: Scene, pieces: list[tuple[bytes, int]], name: str) -> None:
    with connect(str(Path(scene.path).parent / name)) as sock, contextlib.suppress(BrokenPipeError, ConnectionResetError):
        for data, count in pieces:
            _send(sock, data, [memfd] * count)
    scene.undisturbed()
