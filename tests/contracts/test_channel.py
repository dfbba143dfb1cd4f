"""The two ends of a channel over real sockets. Descriptors are counted in /proc before and after each test: none may stay behind."""

import asyncio
import os
import socket

import pytest

from contracts.channel import AsyncChannel, Channel, connect
from contracts.errors import ProtocolError
from contracts.frames import encode
from contracts.lane_wire import Attach, MapSegment, Spawn, ToLaneCopy
from contracts.wire import Cancel, Failed, Hello, Submit, ToAgent

SPAWN = Spawn(1, "cpu:0", 50, "latency-sensitive", 1 << 20, 1, 0, 0)
ATTACH = Attach("default/f", b"{}", "/store")


def open_descriptors():
    return {fd: os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}")}


@pytest.fixture(autouse=True)
def no_descriptor_stays():
    before = open_descriptors()
    yield
    assert open_descriptors() == before


@pytest.fixture
def pair():
    """A connected pair of sockets, closed whatever the test did with them."""
    ours, theirs = socket.socketpair()
    yield ours, theirs
    ours.close()
    theirs.close()


@pytest.fixture
def memfds():
    """Makes memfds that hold the text given."""
    made = []

    def make(text):
        fd = os.memfd_create(text)
        os.write(fd, text.encode())
        made.append(fd)
        return fd

    yield make
    for fd in made:
        os.close(fd)


def read_and_close(fd):
    text = os.pread(fd, 100, 0).decode()
    os.close(fd)
    return text


class Peer:
    """An AsyncChannel that keeps what it was called with."""

    def __init__(self, sock, expected):
        self.messages = []
        self.closed = asyncio.get_running_loop().create_future()
        self.arrived = asyncio.Event()
        self.channel = AsyncChannel(sock, expected, self._on_message, self.closed.set_result)

    def _on_message(self, message, fds):
        self.messages.append((message, fds))
        self.arrived.set()

    async def receive(self, count):
        while len(self.messages) < count:
            self.arrived.clear()
            await asyncio.wait_for(self.arrived.wait(), 10)
        return self.messages

    async def error(self):
        return await asyncio.wait_for(self.closed, 10)


def test_messages_and_descriptors_arrive_in_order_at_the_blocking_end(pair, memfds):
    sender, receiver = Channel(pair[0], object), Channel(pair[1], Spawn | Cancel)
    sender.send(Cancel(1))
    sender.send(SPAWN, [memfds(name) for name in ("run", "copy", "slab", "page")])
    sender.send(Cancel(2))
    sender.send(SPAWN, [memfds(name) for name in ("5", "6", "7", "8")])
    assert receiver.receive() == (Cancel(1), [])
    message, fds = receiver.receive()
    assert (message, [read_and_close(fd) for fd in fds]) == (SPAWN, ["run", "copy", "slab", "page"])
    assert receiver.receive() == (Cancel(2), [])
    assert [read_and_close(fd) for fd in receiver.receive()[1]] == ["5", "6", "7", "8"]
    sender.close()
    assert receiver.receive() is None


def test_descriptors_that_arrive_are_not_handed_to_programs_started_later(pair, memfds):
    Channel(pair[0], object).send(ATTACH, [memfds("weights")])
    _, (fd,) = Channel(pair[1], ToLaneCopy).receive()
    assert not os.get_inheritable(fd)
    os.close(fd)


def test_a_blocking_end_that_closes_closes_what_nobody_took(pair, memfds):
    sender, receiver = Channel(pair[0], object), Channel(pair[1], ToLaneCopy)
    for _ in range(3):
        sender.send(ATTACH, [memfds("weights")])
    _, (fd,) = receiver.receive()
    os.close(fd)
    receiver.close()


def test_descriptors_that_no_message_announced_are_closed_with_the_channel(pair, memfds):
    Channel(pair[0], object).send(Cancel(1), [memfds("surplus"), memfds("more")])
    receiver = Channel(pair[1], ToAgent)
    assert receiver.receive() == (Cancel(1), [])
    receiver.close()


def test_a_message_without_its_descriptors_is_a_protocol_error(pair, memfds):
    socket.send_fds(pair[0], [encode(SPAWN)], [memfds("run"), memfds("copy")])
    receiver = Channel(pair[1], Spawn)
    with pytest.raises(ProtocolError, match="a Spawn came without its 4 file descriptors"):
        receiver.receive()
    receiver.close()


@pytest.mark.parametrize("count", [17, 40], ids=["one more than is ever announced", "more than fit"])
def test_more_descriptors_than_any_message_announces_are_a_protocol_error(pair, memfds, count):
    shared = memfds("one")
    socket.send_fds(pair[0], [encode(Cancel(1))], [shared] * count)
    receiver = Channel(pair[1], ToAgent)
    with pytest.raises(ProtocolError, match="file descriptors came"):
        receiver.receive()
    receiver.close()


def test_surplus_descriptors_cannot_be_saved_up(pair, memfds):
    shared = memfds("one")
    for _ in range(20):
        socket.send_fds(pair[0], [encode(Cancel(1))], [shared])
    receiver = Channel(pair[1], ToAgent)
    with pytest.raises(ProtocolError, match="no frame announced"):
        list(iter(receiver.receive, None))
    receiver.close()


def test_the_descriptors_of_good_messages_before_a_bad_one_are_closed_too(pair, memfds):
    socket.send_fds(pair[0], [encode(Hello(1, 4096)) + b"\x00\x00\x00\x01\xc1"], [memfds("segment")])
    receiver = Channel(pair[1], ToAgent)
    with pytest.raises(ProtocolError, match="no message that is expected"):
        receiver.receive()
    receiver.close()


@pytest.mark.asyncio
async def test_messages_and_descriptors_arrive_in_order_at_the_asyncio_end(pair, memfds):
    left, right = Peer(pair[0], ToAgent), Peer(pair[1], ToLaneCopy | MapSegment | Cancel)
    left.channel.send(Cancel(1), Cancel(2))
    left.channel.send(ATTACH, Cancel(3), fds=[memfds("weights")])
    left.channel.send(MapSegment(1, 4096), fds=[memfds("segment")])
    messages = await right.receive(5)
    assert [message for message, _ in messages] == [Cancel(1), Cancel(2), ATTACH, Cancel(3), MapSegment(1, 4096)]
    assert [[read_and_close(fd) for fd in fds] for _, fds in messages] == [[], [], ["weights"], [], ["segment"]]
    left.channel.close()
    assert await right.error() is None
    assert await left.error() is None


@pytest.mark.asyncio
async def test_what_the_socket_cannot_take_waits_with_its_descriptors_and_keeps_its_order(pair, memfds):
    left, right = Peer(pair[0], ToAgent), Peer(pair[1], Failed | MapSegment)
    right.channel._loop.remove_reader(pair[1].fileno())
    long = "x" * 300_000
    for number in range(8):
        left.channel.send(Failed(number, "Refused", long))
        fd = memfds(f"segment {number}")
        left.channel.send(MapSegment(number, 1), fds=[fd])
        os.ftruncate(fd, 100)
    right.channel._loop.add_reader(pair[1].fileno(), right.channel._on_readable)
    messages = await right.receive(16)
    assert [message for message, _ in messages] == [m for n in range(8) for m in (Failed(n, "Refused", long), MapSegment(n, 1))]
    assert [read_and_close(fd).rstrip("\0") for _, fds in messages for fd in fds] == [f"segment {n}" for n in range(8)]
    left.channel.close()
    await right.error()


@pytest.mark.asyncio
async def test_a_peer_that_does_not_read_is_closed_and_its_waiting_descriptors_with_it(pair, memfds):
    left = Peer(pair[0], ToAgent)
    weights = memfds("weights")
    for number in range(40):
        left.channel.send(Failed(number, "Refused", "x" * (1 << 20)))
        left.channel.send(ATTACH, fds=[weights])
    error = await left.error()
    assert isinstance(error, ProtocolError)
    assert "does not read" in str(error)
    left.channel.send(Cancel(1))
    assert pair[0].fileno() == -1


@pytest.mark.asyncio
async def test_a_peer_that_has_gone_is_an_end_or_an_error_but_once(pair):
    left = Peer(pair[0], ToAgent)
    pair[1].close()
    for _ in range(3):
        left.channel.send(Cancel(1))
    error = await left.error()
    assert error is None or isinstance(error, OSError)
    assert left.channel.closed


NONSENSE = {
    "a frame that is too long": b"\xff\xff\xff\xff",
    "a message of another direction": encode(Failed(1, "Refused", "")),
    "no MessagePack": b"\x00\x00\x00\x01\xc1",
    "text that is no UTF-8": encode(Submit(1, "abcde", (), 1, 2)).replace(b"abcde", b"\xff\xff\xff\xff\xff"),
    "a segment that does not come": encode(Hello(1, 4096)),
}


@pytest.mark.asyncio
@pytest.mark.parametrize("data", NONSENSE.values(), ids=NONSENSE)
async def test_a_peer_that_sends_nonsense_is_closed_with_the_error(pair, data):
    left = Peer(pair[0], ToAgent)
    pair[1].sendall(encode(Cancel(1)))
    await left.receive(1)
    pair[1].sendall(data + encode(Cancel(2)))
    assert isinstance(await left.error(), ProtocolError)
    assert [message for message, _ in left.messages] == [Cancel(1)]
    assert pair[1].recv(1) == b""


@pytest.mark.asyncio
async def test_half_a_frame_and_then_the_end_is_the_end(pair):
    left = Peer(pair[0], ToAgent)
    pair[1].sendall(encode(Cancel(1))[:-1])
    pair[1].close()
    assert await left.error() is None
    assert left.messages == []


@pytest.mark.asyncio
async def test_a_message_that_the_receiver_refuses_closes_the_channel_with_the_reason(pair, memfds):
    def refuse(message, fds):
        raise ProtocolError("a Hello came twice")

    closed = asyncio.get_running_loop().create_future()
    AsyncChannel(pair[0], ToAgent, refuse, closed.set_result)
    socket.send_fds(pair[1], [encode(Cancel(1)) + encode(Hello(1, 4096))], [memfds("segment")])
    assert "twice" in str(await asyncio.wait_for(closed, 10))
    assert pair[1].recv(1) == b""


@pytest.mark.asyncio
async def test_a_failing_receiver_is_reported_and_the_loop_goes_on(pair):
    def fail(message, fds):
        raise KeyError("a defect")

    reported = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: reported.append(context))
    closed = loop.create_future()
    AsyncChannel(pair[0], ToAgent, fail, closed.set_result)
    pair[1].sendall(encode(Cancel(1)))
    assert isinstance(await asyncio.wait_for(closed, 10), KeyError)
    assert [type(context["exception"]) for context in reported] == [KeyError]


@pytest.mark.asyncio
async def test_a_receiver_that_closes_in_the_middle_gets_no_more_and_keeps_no_descriptor(pair, memfds):
    seen = []

    def close_at_once(message, fds):
        seen.append(message)
        channel.close()

    closed = asyncio.get_running_loop().create_future()
    channel = AsyncChannel(pair[0], ToAgent, close_at_once, closed.set_result)
    socket.send_fds(pair[1], [encode(Cancel(1)) + encode(Hello(1, 4096))], [memfds("segment")])
    assert await asyncio.wait_for(closed, 10) is None
    assert seen == [Cancel(1)]


def test_connecting_to_nothing_leaves_nothing_open(tmp_path):
    with pytest.raises(FileNotFoundError):
        connect(str(tmp_path / "agent.sock"))


def test_connecting_gives_a_socket_that_programs_started_later_do_not_inherit(tmp_path):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "agent.sock"))
        listener.listen()
        with connect(str(tmp_path / "agent.sock")) as sock:
            assert not sock.get_inheritable()
