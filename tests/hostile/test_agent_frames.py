"""Peers of agent.sock that stutter, shout or break the protocol: they are closed, the others notice nothing, nothing is left behind."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contracts import lane_wire, wire
from contracts.channel import Channel, connect
from contracts.frames import MAX_FRAME_BYTES, encode
from contracts.functions import Share
from contracts.wire import PROTOCOL_VERSION, Answer, Failed, Hello, Part, Submit, TensorRef
from tests.faults.real import Predictor, function, rows_of, source
from tests.hostile.conftest import Scene
from tests.hostile.messages import MESSAGES, REF, SEGMENT

FUTURE_WRITE = 0x10
"""F_SEAL_FUTURE_WRITE of linux/fcntl.h."""
MANY = settings(max_examples=150)


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
SUBMIT = encode(Submit(1, "default/others", (), 0, 0))
Frame = tuple[bytes, Iterable[Callable[[], int]]]


def _foreign(message: wire.Message) -> list[Frame]:
    """A message that is none of agent.sock, after a proper Hello; with the descriptors that it announces."""
    return [(HELLO, [memfd]), (encode(message), [memfd] * message.FDS)]


SHARE = Share(10, 10)
SPAWN = lane_wire.Spawn(1, "cpu:0", 100, function("x", "mlp").cls, SEGMENT, 1, 0, 0)
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
    "a lane's message: BatchDone": _foreign(lane_wire.BatchDone(1, 0, 0)),
    "a lane's message: BatchPaused": _foreign(lane_wire.BatchPaused(1, 0)),
    "a lane's message: LaneReady": _foreign(lane_wire.LaneReady(1, os.getpid(), 100)),
    "a lane's message: CopyProgress": _foreign(lane_wire.CopyProgress(1, 1)),
    "a lane's message: Attached": _foreign(lane_wire.Attached("default/mine@1", "broken")),
    "the agent's message: Run": _foreign(lane_wire.Run(1, "default/mine", 0, 0, 1, (), False)),
    "the agent's message: MapSegment": _foreign(lane_wire.MapSegment(1, SEGMENT)),
    "the agent's message: Attach": _foreign(lane_wire.Attach("default/mine", b"{}", "/")),
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
