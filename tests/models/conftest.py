"""What the tests of `models` share: one thread (bit-for-bit), a store, files of every format, and a model bound to a buffer as a lane binds it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import torch
from torch import Tensor, nn

from contracts.artifact import Signature, TensorSpec, WeightIndex
from models.program import Executable, build
from models.weights import views

MARGIN = 3 * 256


class Net(nn.Module):
    """A small model with what is easy to get wrong: a tied weight, buffers that are not saved, a constant, a parameter used between its children."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.second.weight = self.first.weight
        self.scale = nn.Parameter(torch.rand(8))
        self.norm = nn.BatchNorm1d(8)
        self.register_buffer("shift", torch.rand(8), persistent=False)
        self.register_buffer("unused", torch.rand(5))
        self.constant = torch.rand(8)

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Two outputs from two inputs, each [batch, 8]."""
        hidden = torch.relu(self.first(x)) * self.scale
        hidden = self.norm(self.second(hidden) + self.shift) * self.constant
        hidden = self.first(hidden)
        return {"scores": self.third(hidden), "sum": (hidden + y).sum(-1)}


NET = Signature(
    inputs=(TensorSpec("x", "FP32", ("batch", 8)), TensorSpec("y", "FP32", ("batch", 8))),
    outputs=(TensorSpec("scores", "FP32", ("batch", 4)), TensorSpec("sum", "FP32", ("batch",))),
)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """An empty host store."""
    folder = tmp_path / "store"
    folder.mkdir()
    return folder


@pytest.fixture(scope="session")
def net() -> nn.Module:
    """The small model."""
    torch.manual_seed(7)
    return Net().eval()


@pytest.fixture(scope="session")
def pt2(net: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model, exported."""
    path = tmp_path_factory.mktemp("pt2") / "net.pt2"
    batch = torch.export.Dim("batch")
    inputs = (torch.rand(2, 8), torch.rand(2, 8))
    torch.export.save(torch.export.export(net, inputs, dynamic_shapes={"x": {0: batch}, "y": {0: batch}}), path)
    return path


@pytest.fixture(scope="session")
def torchscript(net: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model as TorchScript, its signature beside it."""
    path = tmp_path_factory.mktemp("script") / "net.pt"
    torch.jit.save(torch.jit.script(net), path)
    path.with_name("net.signature.json").write_bytes(msgspec.json.encode(NET))
    return path


class Placed:
    """A model of the store in a larger buffer full of garbage, as in a device's slab. `arrive(n)` copies up to the first n bytes of its weights."""

    def __init__(self, index: WeightIndex, store: Path) -> None:
        self.index = index
        self.executable: Executable = build(index, store)
        self._file = torch.frombuffer(bytearray((store / f"{index.digest}.weights").read_bytes()), dtype=torch.uint8)
        slab = torch.full((index.total_bytes + 2 * MARGIN,), 0xFF, dtype=torch.uint8)
        self._place = slab[MARGIN : MARGIN + index.total_bytes]
        self._arrived = 0
        self.executable.bind(views(self._place, index))

    def arrive(self, until: int) -> None:
        """Copies the next bytes, if `until` lies beyond what has arrived."""
        if until > self._arrived:
            self._place[self._arrived : until] = self._file[self._arrived : until]
            self._arrived = until

    def run(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Runs with whatever has arrived."""
        with torch.inference_mode():
            return self.executable(inputs)

    def run_behind_gates(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Runs from nothing: at each gate only the prefix that it asks for arrives."""
        module = self.executable.module
        handles = [
            module.get_submodule(gate.module).register_forward_pre_hook(lambda _module, _args, need=gate.need_bytes: self.arrive(need))
            for gate in self.index.gates
        ]
        try:
            return self.run(inputs)
        finally:
            for handle in handles:
                handle.remove()


@pytest.fixture
def place(store: Path) -> Callable[[WeightIndex], Placed]:
    """Puts a model of the store into a buffer."""
    return lambda index: Placed(index, store)
