"""Real models behind a real agent, and the same models run directly: what the tests of whole nodes compare, bit for bit."""

from __future__ import annotations

import functools
import time

import numpy as np
import torch

from contracts.artifact import Signature
from contracts.functions import ModelFormat, ModelRef
from contracts.units import S
from contracts.wire import Answer, Part, Submit, TensorRef, Welcome
from models.load import Loaded, load
from models.samples import sample_inputs
from tests.nodeagent.node import Node, Predictor

Arrays = dict[str, np.ndarray]


def model(number: int) -> ModelRef:
    """The model of function `f<number>`."""
    return ModelRef(ModelFormat.CATALOG, f"mlp?seed={number}")


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
    """Inputs of a function."""
    return sample_inputs(model(number), rows, seed)


def check(number: int, parts: list[Arrays], outputs: list[Arrays]) -> None:
    """The same batch, run directly with as many threads as a lane has, gives these outputs."""
    joined = {name: torch.cat([torch.from_numpy(np.array(part[name])) for part in parts]) for name in parts[0]}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        expected = {name: tensor.numpy() for name, tensor in _loaded(number).run(joined).items()}
    finally:
        torch.set_num_threads(threads)
    row = 0
    for part in outputs:
        rows = len(next(iter(part.values())))
        for name, array in part.items():
            np.testing.assert_array_equal(array, expected[name][row : row + rows])
        row += rows


@functools.cache
def _loaded(number: int) -> Loaded:
    return load(model(number))
