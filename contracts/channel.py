"""Framed messages over a connected Unix socket, with file descriptors: a blocking end (lane, command line) and an asyncio end (agent, predictor).

Owns its socket and the descriptors that arrived until they are handed over. Never interprets a message.
"""

from __future__ import annotations

import array
import asyncio
import os
import select
import socket
from collections import deque
from collections.abc import Callable, Sequence

from contracts.errors import ProtocolError
from contracts.frames import FrameDecoder, encode
from contracts.wire import Message

# Small, so that a peer that floods its socket cannot hold the loop for long at a time.
_READ_BYTES = 1 << 13
_MAX_FDS = 16
# Plain integers: the enumeration's operators cost microseconds on the way of every message.
_ANCILLARY_BYTES = socket.CMSG_SPACE(_MAX_FDS * 4)
_CLOEXEC = int(socket.MSG_CMSG_CLOEXEC)
_CTRUNC = int(socket.MSG_CTRUNC)
_MAX_UNSENT_BYTES = 32 << 20


class _Receiver:
    """Pairs the descriptors that a socket delivers with the messages that announce them."""

    def __init__(self, expected: object) -> None:
        self._decoder = FrameDecoder(expected)
        self._fds: deque[int] = deque()

    def receive(self, sock: socket.socket) -> list[tuple[Message, list[int]]] | None:
        """The messages that one read completes; None at the end of the stream. BlockingIOError when nothing is there."""
        data, ancillary, flags, _ = sock.recvmsg(_READ_BYTES, _ANCILLARY_BYTES, _CLOEXEC)
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                self._fds.extend(array.array("i", payload[: len(payload) - len(payload) % 4]))
        if flags & _CTRUNC:
            raise ProtocolError("more file descriptors came with a frame than fit")
        if not data:
            return None
        ready: list[tuple[Message, list[int]]] = []
        try:
            for message in self._decoder.feed(data):
                if len(self._fds) < message.FDS:
                    raise ProtocolError(f"a {type(message).__name__} came without its {message.FDS} file descriptors")
                ready.append((message, [self._fds.popleft() for _ in range(message.FDS)] if message.FDS else []))
            if len(self._fds) > _MAX_FDS:
                raise ProtocolError("file descriptors came that no frame announced")
        except ProtocolError:
            for _, fds in ready:
                self._fds.extend(fds)
            raise
        return ready

    def close(self) -> None:
        """Closes the descriptors that no message claimed."""
        while self._fds:
            os.close(self._fds.popleft())


class Channel:
    """The blocking end. Sends and receives from one thread each."""

    def __init__(self, sock: socket.socket, expected: object) -> None:
        self._sock = sock
        self._receiver = _Receiver(expected)
        self._ready: deque[tuple[Message, list[int]]] = deque()

    def fileno(self) -> int:
        """The socket's descriptor."""
        return self._sock.fileno()

    def send(self, message: Message, fds: Sequence[int] = ()) -> None:
        """Sends one message whole; OSError when the peer has gone."""
        frame = encode(message)
        sent = socket.send_fds(self._sock, [frame], list(fds)) if fds else self._sock.send(frame)
        if sent < len(frame):
            self._sock.sendall(frame[sent:])

    def receive(self) -> tuple[Message, list[int]] | None:
        """The next message and its descriptors; None at the end of the stream."""
        while not self._ready:
            messages = self._receiver.receive(self._sock)
            if messages is None:
                return None
            self._ready.extend(messages)
        return self._ready.popleft()

    def waiting(self, timeout_s: float) -> bool:
        """Whether a message, or the end of the stream, is there within so many seconds."""
        if self._ready:
            return True
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        return bool(poll.poll(1000 * timeout_s))

    def close(self) -> None:
        """Closes the socket and every descriptor not handed over."""
        for _, fds in self._ready:
            for fd in fds:
                os.close(fd)
        self._ready.clear()
        self._receiver.close()
        self._sock.close()


class AsyncChannel:
    """The asyncio end: calls `on_message(message, fds)` for each message and `on_close(error)` exactly once.

    A peer that does not read, or that sends nonsense, is closed (with the error); it can hold neither the loop nor memory. What `on_message` raises
    closes it too: ProtocolError is how it refuses a message out of order.
    """

    def __init__(
        self,
        sock: socket.socket,
        expected: object,
        on_message: Callable[[Message, list[int]], None],
        on_close: Callable[[Exception | None], None],
    ) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._receiver = _Receiver(expected)
        self._on_message = on_message
        self._on_close = on_close
        self._unsent: deque[tuple[bytes, tuple[int, ...]]] = deque()
        self._unsent_bytes = 0
        self._loop = asyncio.get_running_loop()
        self.closed = False
        self._loop.add_reader(sock.fileno(), self._on_readable)

    @property
    def socket(self) -> socket.socket:
        """The socket, for its credentials."""
        return self._sock

    def send(self, *messages: Message, fds: Sequence[int] = ()) -> None:
        """Sends messages in one write where it can; `fds` travel with the first. They are duplicated if they have to wait. No-op once closed."""
        if self.closed:
            return
        data = b"".join(map(encode, messages))
        if not self._unsent:
            try:
                sent = socket.send_fds(self._sock, [data], list(fds)) if fds else self._sock.send(data)
            except (BlockingIOError, InterruptedError):
                sent = 0
            except OSError as error:
                self._loop.call_soon(self.close, error)
                return
            if sent == len(data):
                return
            if sent:
                data, fds = data[sent:], ()
            self._loop.add_writer(self._sock.fileno(), self._on_writable)
        self._unsent.append((data, tuple(os.dup(fd) for fd in fds)))
        self._unsent_bytes += len(data)
        if self._unsent_bytes > _MAX_UNSENT_BYTES:
            self._loop.call_soon(self.close, ProtocolError("the peer does not read its messages"))

    def close(self, error: Exception | None = None) -> None:
        """Closes at once; what was not sent is lost."""
        if self.closed:
            return
        self.closed = True
        self._loop.remove_reader(self._sock.fileno())
        self._loop.remove_writer(self._sock.fileno())
        for _, fds in self._unsent:
            for fd in fds:
                os.close(fd)
        self._unsent.clear()
        self._receiver.close()
        self._sock.close()
        self._on_close(error)

    def _on_readable(self) -> None:
        try:
            messages = self._receiver.receive(self._sock)
        except (BlockingIOError, InterruptedError):
            return
        except (OSError, ProtocolError) as error:
            self.close(error)
            return
        if messages is None:
            self.close()
            return
        for message, fds in messages:
            if self.closed:
                for fd in fds:
                    os.close(fd)
            else:
                self._deliver(message, fds)

    def _deliver(self, message: Message, fds: list[int]) -> None:
        try:
            self._on_message(message, fds)
        except Exception as error:
            if not isinstance(error, ProtocolError):
                self._loop.call_exception_handler({"message": f"a {type(message).__name__} could not be handled", "exception": error})
            self.close(error)

    def _on_writable(self) -> None:
        while self._unsent:
            data, fds = self._unsent.popleft()
            try:
                sent = socket.send_fds(self._sock, [data], list(fds)) if fds else self._sock.send(data)
            except (BlockingIOError, InterruptedError):
                self._unsent.appendleft((data, fds))
                return
            except OSError as error:
                self._unsent.appendleft((data, fds))
                self.close(error)
                return
            self._unsent_bytes -= sent
            for fd in fds:
                os.close(fd)
            if sent < len(data):
                self._unsent.appendleft((data[sent:], ()))
                return
        self._loop.remove_writer(self._sock.fileno())


def connect(path: str) -> socket.socket:
    """A stream socket, connected to `path`; OSError as the kernel gives it."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        sock.connect(path)
    except OSError:
        sock.close()
        raise
    return sock
