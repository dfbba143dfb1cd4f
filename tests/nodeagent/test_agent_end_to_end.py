"""The real agent, loader, fork server and lanes: every answer equals the same batch run without swapping, bit for bit, whatever dies."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from contracts.artifact import Signature
from contracts.functions import Function, ModelFormat, ModelRef, Share
from contracts.units import S
from contracts.wire import Answer, Failed, Part, Submit, TensorRef, Welcome
from models.load import Loaded, load
from models.samples import sample_inputs
from tests.faults.census import alive, command
from tests.nodeagent.node import Control, Node, Predictor, eventually, short_folder

FUNCTIONS = 12
SOURCES = [f"mlp?seed={seed}" for seed in range(FUNCTIONS)]
Arrays = dict[str, np.ndarray]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The reference runs with as many threads as a lane."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def references() -> list[Loaded]:
    """The models, unswapped."""
    return [load(ModelRef(ModelFormat.CATALOG, source)) for source in SOURCES]


def _function(number: int) -> Function:
    return Function(f"f{number}", ModelRef(ModelFormat.CATALOG, SOURCES[number]), share=Share(100, 500))


def _start(run_dir: os.PathLike[str]) -> tuple[Node, Control]:
    node = Node(run_dir, module="nodeagent", memory="12Mi", host="256Mi").ready()
    control = Control(node.run_dir)
    control.grant()
    control.declare(*map(_function, range(FUNCTIONS)))
    return node, control


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[Node, Control]]:
    """A node whose device holds three of its twelve models, for all tests of this file; the last one kills it."""
    with short_folder() as folder:
        node, control = _start(folder / "run")
        yield node, control
        control.channel.close()
        node.remove()


class Caller:
    """A predictor that places real inputs in its segment and remembers them."""

    def __init__(self, node: Node) -> None:
        self.predictor = Predictor(node.run_dir, 64 << 20)
        assert self.predictor.receive()
        welcome = self.predictor.notices[0]
        assert isinstance(welcome, Welcome)
        self._signatures = {info.function.key: info.signature for info in welcome.functions}
        self._end = 0
        self._ids = 0

    def submit(self, number: int, parts: list[Arrays]) -> Submit:
        """Sends a batch whose parts are the inputs of single requests."""
        signature = self._signatures[f"default/f{number}"]
        assert signature is not None
        self._ids += 1
        now_ns = time.monotonic_ns()
        batch = Submit(self._ids, f"default/f{number}", tuple(self._place(signature, part) for part in parts), now_ns + 30 * S, now_ns + 60 * S)
        self.predictor.channel.send(batch)
        return batch

    def answer(self, batch: Submit) -> list[Arrays]:
        """The outputs of each part."""
        outcome = self.predictor.outcome(batch)
        assert isinstance(outcome, Answer), outcome
        return [
            {ref.name: np.frombuffer(self.predictor.memory, "<f4", ref.nbytes // 4, ref.offset).reshape(ref.shape) for ref in part.outputs}
            for part in batch.parts
        ]

    def _place(self, signature: Signature, inputs: Arrays) -> Part:
        placed = []
        for spec in signature.inputs:
            array = np.ascontiguousarray(inputs[spec.name])
            offset = self._take(array.nbytes)
            self.predictor.memory[offset : offset + array.nbytes] = array.tobytes()
            placed.append(TensorRef(spec.name, spec.dtype, array.shape, offset, array.nbytes))
        sizes = signature.bind({ref.name: (ref.dtype, ref.shape) for ref in placed})
        outputs = [TensorRef(spec.name, spec.dtype, shape, self._take(nbytes), nbytes) for spec, shape, nbytes in signature.output_shapes(sizes)]
        return Part(sizes["batch"], tuple(placed), tuple(outputs))

    def _take(self, nbytes: int) -> int:
        offset, self._end = self._end, self._end + -(-nbytes // 64) * 64
        return offset


def draw(number: int, rows: int, seed: int) -> Arrays:
    return sample_inputs(ModelRef(ModelFormat.CATALOG, SOURCES[number]), rows, seed)


def check(reference: Loaded, parts: list[Arrays], outputs: list[Arrays]) -> None:
    """The same batch, run directly."""
    joined = {name: torch.cat([torch.from_numpy(np.array(part[name])) for part in parts]) for name in parts[0]}
    expected = {name: tensor.numpy() for name, tensor in reference.run(joined).items()}
    row = 0
    for part in outputs:
        rows = len(next(iter(part.values())))
        for name, array in part.items():
            np.testing.assert_array_equal(array, expected[name][row : row + rows])
        row += rows


def test_every_answer_equals_the_unswapped_reference(served: tuple[Node, Control], references: list[Loaded]) -> None:
    node, control = served
    caller = Caller(node)
    chance = random.Random(20)
    answered = []
    for turn in range(10):
        sent = []
        for number in chance.sample(range(FUNCTIONS), FUNCTIONS):
            parts = [draw(number, rows, turn) for rows in chance.choice([(1,), (3,), (1, 2), (2, 1, 1)])]
            sent.append((number, parts, caller.submit(number, parts)))
        for number, parts, batch in sent:
            check(references[number], parts, caller.answer(batch))
            answered.append(parts)
    status = control.status()
    assert sum(function.answered for function in status.functions) == sum(len(parts) for parts in answered)
    assert status.devices[0].swaps > FUNCTIONS
    assert all(function.failed == 0 for function in status.functions)


def test_kill_9_of_lanes_under_load_loses_no_request_and_changes_no_answer(served: tuple[Node, Control], references: list[Loaded]) -> None:
    node, control = served
    caller = Caller(node)
    parts = [draw(0, 1, 1)]
    check(references[0], parts, caller.answer(caller.submit(0, parts)))
    for turn in range(3):
        sent = [(number, draw(number, 2, turn)) for number in range(FUNCTIONS)]
        batches = [caller.submit(number, [inputs]) for number, inputs in sent]
        victim = eventually(lambda: next((lane.pid for lane in control.status().devices[0].lanes if lane.pid), 0), "a lane")
        os.kill(victim, signal.SIGKILL)
        for (number, inputs), batch in zip(sent, batches, strict=True):
            outcome = caller.predictor.outcome(batch)
            if isinstance(outcome, Failed):
                assert outcome.kind == "Unavailable"
            else:
                check(references[number], [inputs], caller.answer(batch))
    check(references[0], parts, caller.answer(caller.submit(0, parts)))


def test_a_changed_share_is_felt_at_once_and_loses_nothing(served: tuple[Node, Control], references: list[Loaded]) -> None:
    node, control = served
    caller = Caller(node)
    inputs = draw(1, 1, 3)
    stop = threading.Event()
    batches: list[Submit] = []

    def call() -> None:
        while not stop.is_set():
            batches.append(caller.submit(1, [inputs]))
            check(references[1], [inputs], caller.answer(batches[-1]))

    thread = threading.Thread(target=call)
    thread.start()
    for sm_percent in (50, 10, 100):
        control.share("default/f1", Share(sm_percent, 500))
        eventually(lambda size=sm_percent: any(lane.sm_percent == size and lane.pid for lane in control.status().devices[0].lanes), "its lane")
    stop.set()
    thread.join()
    assert all(isinstance(caller.predictor.outcomes[batch.id], Answer) for batch in batches)


def test_kill_9_of_the_agent_leaves_no_process_and_the_next_serves_without_loading(served: tuple[Node, Control], references: list[Loaded]) -> None:
    node, _ = served
    caller = Caller(node)
    parts = [draw(5, 1, 7)]
    check(references[5], parts, caller.answer(caller.submit(5, parts)))
    children = node.children()
    files = {path.name: path.stat().st_ino for path in node.store.iterdir()}
    node.kill()
    eventually(lambda: not any(map(alive, children)), "the end of its processes")
    again, _ = _start(node.run_dir)
    try:
        assert {path.name: path.stat().st_ino for path in again.store.iterdir()} == files
        assert not any("models.loader" in command(child) for child in again.children())
        caller = Caller(again)
        check(references[5], parts, caller.answer(caller.submit(5, parts)))
    finally:
        assert again.terminate() == 0
        again.remove()
