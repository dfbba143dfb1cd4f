"""Predictors that lie, stutter or shout: an error for the sender, nothing for the others, nothing left behind."""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contracts.channel import connect
from contracts.frames import MAX_FRAME_BYTES, encode
from contracts.functions import Share
from contracts.wire import PROTOCOL_VERSION, Answer, Cancel, Failed, GetStatus, Hello, Message, Part, Submit, TensorRef
from tests.nodeagent.node import Control, Node, Predictor, eventually, function, short_folder

ROWS = np.ones((2, 4), "<f4")
SEGMENT = 1 << 20


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[Node, Predictor]]:
    """One agent with functions a (granted) and b, for all tests of this file, and the well-behaved predictor beside the hostile one."""
    with short_folder() as path:
        node = Node(path / "run").ready()
        control = Control(node.run_dir)
        # All SMs: there is room for one lane, so that the descriptors of lanes do not come and go while they are counted.
        control.declare(function("a", "add?value=1", share=Share(100, 1000)), function("b", "add?value=2", share=Share(100, 1000)))
        control.grant("default/a", "default/ghost")
        predictor = Predictor(node.run_dir)
        predictor.call("default/a", ROWS)
        yield node, predictor
        assert node.terminate() == 0
        node.remove()


def still_serves(served: tuple[Node, Predictor]) -> None:
    """The other predictor notices nothing."""
    np.testing.assert_array_equal(served[1].call("default/a", ROWS)[0], ROWS + 1)


def _part(batch: Submit, **changes: object) -> Submit:
    return msgspec.structs.replace(batch, parts=(msgspec.structs.replace(batch.parts[0], **changes),))


def _input(**changes: object) -> Callable[[Submit], Submit]:
    return lambda batch: _part(batch, inputs=(msgspec.structs.replace(batch.parts[0].inputs[0], **changes),))


def _output(**changes: object) -> Callable[[Submit], Submit]:
    return lambda batch: _part(batch, outputs=(msgspec.structs.replace(batch.parts[0].outputs[0], **changes),))


def _named(name: str) -> Callable[[Submit], Submit]:
    return lambda batch: msgspec.structs.replace(batch, function=name)


WRONG: dict[str, tuple[Callable[[Submit], Submit], str]] = {
    "another's function": (_named("default/b"), "NotPermitted"),
    "a function that does not exist": (_named("default/ghost"), "NotFound"),
    "a name that would be a path": (_named("../../etc/passwd"), "NotPermitted"),
    "a very long name": (_named("x" * 100_000), "NotPermitted"),
    "no parts": (lambda batch: msgspec.structs.replace(batch, parts=()), "InvalidTensor"),
    "another input name": (_input(name="z"), "InvalidTensor"),
    "another dtype": (_input(dtype="INT32"), "InvalidTensor"),
    "an unknown dtype": (_input(dtype="../x"), "InvalidTensor"),
    "another rank": (_input(shape=(8,)), "InvalidTensor"),
    "another width": (_input(shape=(2, 5), nbytes=40), "InvalidTensor"),
    "a negative dimension": (_input(shape=(-2, 4)), "InvalidTensor"),
    "a shape of more bytes than said": (_input(shape=(2**40, 4)), "InvalidTensor"),
    "fewer bytes than the shape": (_input(nbytes=31), "InvalidTensor"),
    "an input before the segment": (_input(offset=-4), "InvalidTensor"),
    "an input across the end of the segment": (_input(offset=SEGMENT - 16), "InvalidTensor"),
    "an input far outside": (_input(offset=2**62), "InvalidTensor"),
    "an input at an odd place": (_input(offset=2), "InvalidTensor"),
    "an output outside": (_output(offset=SEGMENT - 4), "InvalidTensor"),
    "too little room for the output": (_output(nbytes=16), "InvalidTensor"),
    "an output of another shape": (_output(shape=(1, 4), nbytes=16), "InvalidTensor"),
    "an output of another name": (_output(name="x"), "InvalidTensor"),
    "no outputs": (lambda batch: _part(batch, outputs=()), "InvalidTensor"),
    "an output twice": (lambda batch: _part(batch, outputs=batch.parts[0].outputs * 2), "InvalidTensor"),
    "an input twice": (lambda batch: _part(batch, inputs=batch.parts[0].inputs * 2), "InvalidTensor"),
    "other rows than the tensors": (lambda batch: _part(batch, rows=3), "InvalidTensor"),
    "no rows": (lambda batch: _part(batch, rows=0), "InvalidTensor"),
    "more rows than the function joins": (lambda batch: msgspec.structs.replace(batch, parts=batch.parts * 5), "InvalidTensor"),
    "a deadline long past": (lambda batch: msgspec.structs.replace(batch, slo_deadline_ns=1, deadline_ns=1), "Refused"),
}


@pytest.mark.parametrize(("spoil", "kind"), WRONG.values(), ids=WRONG)
def test_a_wrong_submit_fails_and_the_connection_goes_on(spoil: Callable[[Submit], Submit], kind: str, served: tuple[Node, Predictor]) -> None:
    node, _ = served
    hostile = Predictor(node.run_dir)
    batch = spoil(hostile.batch("default/a", ROWS))
    hostile.channel.send(batch)
    outcome = hostile.outcome(batch)
    assert isinstance(outcome, Failed)
    assert outcome.kind == kind
    assert len(outcome.message) < 1000
    np.testing.assert_array_equal(hostile.call("default/a", ROWS)[0], ROWS + 1)
    hostile.close()
    still_serves(served)


def _plain_file() -> int:
    return os.open("/dev/shm", os.O_TMPFILE | os.O_RDWR)


def _memfd(nbytes: int = SEGMENT, flags: int = os.MFD_ALLOW_SEALING) -> int:
    fd = os.memfd_create("test", flags)
    os.ftruncate(fd, nbytes)
    return fd


def _sized_plain_file() -> int:
    fd = _plain_file()
    os.ftruncate(fd, SEGMENT)
    return fd


HELLO = Hello(PROTOCOL_VERSION, SEGMENT)
BREAKS: dict[str, list[tuple[Message | bytes, Callable[[], int] | None]]] = {
    "a submit before the hello": [(Submit(1, "default/a", (), 0, 0), None)],
    "two hellos": [(HELLO, _memfd), (HELLO, _memfd)],
    "a hello without its segment": [(HELLO, None)],
    "another protocol": [(Hello(99, SEGMENT), _memfd)],
    "a segment that is shorter than said": [(HELLO, lambda: _memfd(SEGMENT - 1))],
    "a segment of no bytes": [(Hello(PROTOCOL_VERSION, 0), _memfd)],
    "a segment of negative size": [(Hello(PROTOCOL_VERSION, -5), _memfd)],
    "a segment that can shrink": [(HELLO, lambda: _memfd(flags=0))],
    "a file instead of a memfd": [(HELLO, _sized_plain_file)],
    "a socket instead of a memfd": [(HELLO, lambda: socket.socket().detach())],
    "a message of the control socket": [(GetStatus(1), None)],
    "a frame that is too long": [((MAX_FRAME_BYTES + 1).to_bytes(4, "big"), None)],
    "a frame of noise": [(b"\0\0\0\x04\xc1\xc1\xc1\xc1", None)],
    "an empty frame": [(b"\0\0\0\0", None)],
    "the same id twice": [(HELLO, _memfd), (b"TWICE", None)],
}


@pytest.mark.parametrize("frames", BREAKS.values(), ids=BREAKS)
def test_a_broken_protocol_closes_the_sender_only(
    frames: list[tuple[Message | bytes, Callable[[], int] | None]], served: tuple[Node, Predictor]
) -> None:
    node, good = served
    before = _descriptors(node)
    sock = connect(str(node.run_dir / "agent.sock"))
    for frame, make_fd in frames:
        data = encode(good.batch("default/a", ROWS)) * 2 if frame == b"TWICE" else frame if isinstance(frame, bytes) else encode(frame)
        if make_fd is None:
            sock.sendall(data)
        else:
            fd = make_fd()
            socket.send_fds(sock, [data], [fd])
            os.close(fd)
    sock.settimeout(60)
    while _receive(sock):
        pass
    sock.close()
    still_serves(served)
    eventually(lambda: _descriptors(node) <= before, "the closing of all descriptors")


def _receive(sock: socket.socket) -> bytes:
    try:
        return sock.recv(65536)
    except ConnectionResetError:
        return b""


def _send_for_ever(sock: socket.socket, data: bytes) -> None:
    while True:
        sock.sendall(data)


def _descriptors(node: Node) -> int:
    return len(os.listdir(f"/proc/{node.process.pid}/fd"))


@settings(max_examples=60)
@given(
    st.lists(st.one_of(st.binary(max_size=40), st.sampled_from([encode(HELLO), encode(Cancel(1)), encode(Cancel(-1))])), max_size=5), st.booleans()
)
def test_noise_on_either_socket_harms_nobody(served: tuple[Node, Predictor], pieces: list[bytes], to_control: bool) -> None:
    node, _ = served
    with connect(str(node.run_dir / ("control.sock" if to_control else "agent.sock"))) as sock:
        for piece in pieces:
            try:
                sock.sendall(piece)
            except (BrokenPipeError, ConnectionResetError):
                break
    still_serves(served)


REFS = st.builds(
    TensorRef,
    st.sampled_from(["x", "y", ""]),
    st.sampled_from(["FP32", "INT8", "FP16", "?"]),
    st.lists(st.integers(-2, 2**62), max_size=4).map(tuple),
    st.integers(-(2**62), 2**62),
    st.integers(-(2**62), 2**62),
)
PARTS = st.builds(Part, st.integers(-(2**62), 2**62), st.lists(REFS, max_size=3).map(tuple), st.lists(REFS, max_size=3).map(tuple))


@settings(max_examples=100)
@given(
    st.sampled_from(["default/a", "default/b", "", "../a", "\0"]),
    st.lists(PARTS, max_size=4).map(tuple),
    st.integers(-(2**62), 2**62),
    st.integers(-(2**62), 2**62),
)
def test_random_submits_are_answered_once(served: tuple[Node, Predictor], name: str, parts: tuple[Part, ...], slo_ns: int, deadline_ns: int) -> None:
    _, good = served
    number = good.batch("default/a", ROWS).id
    batch = Submit(number, name, parts, slo_ns, deadline_ns)
    good.channel.send(batch)
    assert isinstance(good.outcome(batch), Failed)
    still_serves(served)


def test_a_predictor_that_never_reads_is_cut_off_and_the_others_are_served(served: tuple[Node, Predictor]) -> None:
    node, _ = served
    sock = connect(str(node.run_dir / "agent.sock"))
    fd = _memfd()
    socket.send_fds(sock, [encode(HELLO)], [fd])
    os.close(fd)
    unwanted = encode(Submit(1, "default/b", (), 0, 0)) * 2000
    sock.settimeout(60)
    with pytest.raises((BrokenPipeError, ConnectionResetError)):
        _send_for_ever(sock, unwanted)
    sock.close()
    still_serves(served)


def test_a_segment_cannot_be_cut_short_under_a_lane(served: tuple[Node, Predictor]) -> None:
    node, _ = served
    predictor = Predictor(node.run_dir)
    predictor.call("default/a", ROWS)
    with pytest.raises(PermissionError):
        os.ftruncate(predictor.fd, mmap.PAGESIZE)
    assert isinstance(predictor.outcome(predictor.submit("default/a", ROWS)), Answer)
    predictor.close()


def test_bad_connections_by_the_hundred_write_few_lines(served: tuple[Node, Predictor]) -> None:
    node, _ = served
    before = node.read_log().count("is closed")
    for _ in range(400):
        with connect(str(node.run_dir / "agent.sock")) as sock:
            sock.sendall(b"\xff" * 8)
            with contextlib.suppress(ConnectionResetError):
                assert not sock.recv(1)
    assert node.read_log().count("is closed") - before < 200
    still_serves(served)


def test_the_run_dir_is_closed_to_others(served: tuple[Node, Predictor]) -> None:
    node, _ = served
    assert Path(node.run_dir).stat().st_mode & 0o777 == 0o700
    assert node.store.stat().st_mode & 0o777 == 0o700
