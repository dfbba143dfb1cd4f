"""A node agent made of numpy, for the tests of the predictor: it speaks `contracts.wire` over a real socket and computes in the real segment.

It runs on a thread of its own with blocking sockets, one predictor at a time. `hold` keeps batches unanswered until `release`; `kill` drops the
connection and the listening socket without a word, as a killed agent does; `start` brings it back. `tokenizers` go to each predictor that joins.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec
import numpy as np

from contracts.artifact import Signature, TensorSpec
from contracts.channel import Channel
from contracts.errors import ExecutionError, InvalidTensor, SluiceError, to_wire
from contracts.functions import Function, ModelFormat, ModelRef, Slo
from contracts.units import MS
from contracts.wire import (
    Answer,
    Cancel,
    Failed,
    FunctionChanged,
    FunctionGone,
    FunctionInfo,
    Hello,
    Message,
    Submit,
    TensorRef,
    ToAgent,
    Tokenizer,
    Welcome,
)

Arrays = Mapping[str, np.ndarray]
NUMPY = {"FP32": np.float32, "INT64": np.int64, "UINT8": np.uint8, "BF16": np.uint16, "FP16": np.float16, "BOOL": np.bool_}

DOUBLE = Signature((TensorSpec("x", "FP32", ("batch", 4)),), (TensorSpec("y", "FP32", ("batch", 4)),))
PAIR = Signature(
    (TensorSpec("a", "FP32", ("batch", "n")), TensorSpec("b", "INT64", ("batch", "n"))),
    (TensorSpec("sum", "FP32", ("batch", "n")), TensorSpec("count", "INT64", ("batch",))),
)
_IDS = TensorSpec("input_ids", "INT64", ("batch", "seq"), pad=1)
TOKENS = Signature(
    (_IDS, TensorSpec("attention_mask", "INT64", ("batch", "seq"), pad=0)),
    (TensorSpec("count", "INT64", ("batch",)), TensorSpec("ids", "INT64", ("batch", "seq"))),
    padded=("seq",),
)
SAME = Signature((TensorSpec("x", "UINT8", ("batch", 2)),), (TensorSpec("y", "UINT8", ("batch", 2)),))
ALONE = Signature((TensorSpec("x", "FP32", ("n",)),), (TensorSpec("total", "FP32", ()),), batchable=False)


def double(inputs: Arrays) -> Arrays:
    """y = 2 x; a 13 is too much for it, a 14 is not for it."""
    if (inputs["x"] == 13).any():
        raise ExecutionError("13 is bad luck")
    if (inputs["x"] == 14).any():
        raise InvalidTensor("14 is no input")
    return {"y": inputs["x"] * 2}


def pair(inputs: Arrays) -> Arrays:
    """The sum of both inputs, and the length of each row."""
    rows, length = inputs["a"].shape
    return {"sum": inputs["a"] + inputs["b"].astype(np.float32), "count": np.full(rows, length)}


def tokens(inputs: Arrays) -> Arrays:
    """How many tokens each row has, and the tokens."""
    return {"count": inputs["attention_mask"].sum(1), "ids": inputs["input_ids"]}


def alone(inputs: Arrays) -> Arrays:
    """The sum of everything."""
    return {"total": inputs["x"].sum()}


def same(inputs: Arrays) -> Arrays:
    """y = x."""
    return {"y": inputs["x"]}


MODELS: Mapping[Signature, Callable[[Arrays], Arrays]] = {DOUBLE: double, PAIR: pair, SAME: same, ALONE: alone, TOKENS: tokens}


def info(
    name: str, signature: Signature = DOUBLE, state: str = "ready", slo_ms: int = 1000, timeout_ms: int = 10_000, **more: object
) -> FunctionInfo:
    """A function as the agent announces it."""
    model = ModelRef(ModelFormat.CATALOG, name)
    function = Function(name=name, model=model, slo=Slo(slo_ms * MS), timeout_ns=timeout_ms * MS, **more)  # type: ignore[arg-type]
    return FunctionInfo(function, state, "" if state != "failed" else "it is broken", None if state == "loading" else signature)


class FakeAgent:
    """See the module. `submits` and `cancels` are what came, `batches` the inputs' rows of each batch that ran."""

    def __init__(self, path: Path, *functions: FunctionInfo) -> None:
        self.path = path
        self.functions = {one.function.key: one for one in functions}
        self.submits: list[Submit] = []
        self.cancels: list[int] = []
        self.tokenizers: dict[str, bytes] = {}
        self.delay_s = 0.0
        self.refuse: SluiceError | None = None
        self._go = threading.Event()
        self._go.set()
        self._changed = threading.Condition()
        self._channel: Channel | None = None
        self._segment: mmap.mmap | None = None
        self._listener: socket.socket | None = None
        self._socket: socket.socket | None = None
        self._queue: list[Submit] = []
        self._thread: threading.Thread | None = None
        self._worker: threading.Thread | None = None
        self._alive = False

    def start(self) -> None:
        """Listens."""
        self.path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(self.path))
        self._listener.listen(8)
        self._alive = True
        self._thread = threading.Thread(target=self._listen, args=(self._listener,), daemon=True)
        self._thread.start()
        self._worker = threading.Thread(target=self._work, daemon=True)
        self._worker.start()

    def kill(self) -> None:
        """Goes without a word; what it had accepted is lost."""
        with self._changed:
            self._alive = False
            self._queue.clear()
            self._changed.notify_all()
        for sock in (self._listener, self._socket):
            if sock is not None:
                with contextlib.suppress(OSError):  # the front has gone first
                    sock.shutdown(socket.SHUT_RDWR)
        assert self._thread is not None
        assert self._worker is not None
        self._thread.join()
        self._worker.join()
        self._socket = None

    def hold(self) -> None:
        """From now on batches wait."""
        self._go.clear()

    def release(self) -> None:
        """They go on."""
        self._go.set()
        with self._changed:
            self._changed.notify_all()

    def tell(self, one: FunctionInfo) -> None:
        """A function appeared or changed."""
        self.functions[one.function.key] = one
        with self._changed:
            if self._channel is not None:
                self._send_tokenizers(self._channel)
        self._send(FunctionChanged(one))

    def remove(self, key: str) -> None:
        """A function is gone."""
        del self.functions[key]
        self._send(FunctionGone(key))

    def wait(self, condition: Callable[[], bool], timeout_s: float = 120) -> None:
        """Until something that this agent sees is so."""
        with self._changed:
            assert self._changed.wait_for(condition, timeout_s), "the fake agent waited in vain"

    def _send(self, message: Message) -> None:
        with self._changed:
            if self._channel is not None:
                self._channel.send(message)

    def _send_tokenizers(self, channel: Channel) -> None:
        for name, content in self.tokenizers.items():
            fd = os.memfd_create("tokenizer")
            os.write(fd, content)
            channel.send(Tokenizer(name), [fd])
            os.close(fd)

    def _listen(self, listener: socket.socket) -> None:
        while self._alive:
            try:
                sock, _ = listener.accept()
            except OSError:
                break
            self._socket = sock
            self._serve(Channel(sock, ToAgent))
        listener.close()

    def _serve(self, channel: Channel) -> None:
        try:
            while (received := channel.receive()) is not None:
                message, fds = received
                with self._changed:
                    if isinstance(message, Hello):
                        self._segment = mmap.mmap(fds[0], message.segment_bytes)
                        os.close(fds[0])
                        self._send_tokenizers(channel)
                        channel.send(Welcome(tuple(self.functions.values())))
                        self._channel = channel
                    elif isinstance(message, Submit):
                        self.submits.append(message)
                        self._queue.append(message)
                    elif isinstance(message, Cancel):
                        self.cancels.append(message.id)
                        if any(one.id == message.id for one in self._queue):
                            self._queue = [one for one in self._queue if one.id != message.id]
                            channel.send(Failed(message.id, "Unavailable", "cancelled"))
                    self._changed.notify_all()
        except OSError:
            pass
        with self._changed:
            self._channel = None
        channel.close()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: not self._alive or (self._queue and self._go.is_set()))
                if not self._alive:
                    return
                submit = self._queue.pop(0)
                channel, segment = self._channel, self._segment
            if self.delay_s:
                time.sleep(self.delay_s)
            assert segment is not None
            reply = self._run(submit, segment)
            with self._changed:
                if channel is not None and channel is self._channel:
                    channel.send(reply)

    def _run(self, submit: Submit, segment: mmap.mmap) -> Message:
        if self.refuse is not None:
            return Failed(submit.id, *to_wire(self.refuse))
        signature = self.functions[submit.function].signature
        assert signature is not None
        try:
            given = [{ref.name: _view(segment, ref) for ref in part.inputs} for part in submit.parts]
            joined = {spec.name: _join([part[spec.name] for part in given], spec.pad) for spec in signature.inputs}
            outputs = MODELS[msgspec.structs.replace(signature, text=None)](joined)
        except SluiceError as error:
            return Failed(submit.id, *to_wire(error))
        row = 0
        for part in submit.parts:
            for ref in part.outputs:
                whole = np.asarray(outputs[ref.name])
                own = tuple(slice(0, size) for size in ref.shape[1:])
                _view(segment, ref)[...] = whole[(slice(row, row + part.rows), *own)] if signature.batchable else whole
            row += part.rows
        return Answer(submit.id, queue_ns=1 * MS, swap_ns=2 * MS, run_ns=3 * MS, cold=False, device="fake:0")


def _join(parts: list[np.ndarray], pad: int | None) -> np.ndarray:
    if pad is not None:
        longest = max(part.shape[1] for part in parts)
        parts = [np.pad(part, ((0, 0), (0, longest - part.shape[1])), constant_values=pad) for part in parts]
    return np.concatenate(parts) if len(parts) > 1 else parts[0]


def _view(segment: mmap.mmap, ref: TensorRef) -> np.ndarray:
    dtype = np.dtype(NUMPY[ref.dtype])
    return np.frombuffer(segment, dtype, ref.nbytes // dtype.itemsize, ref.offset).reshape(ref.shape)
