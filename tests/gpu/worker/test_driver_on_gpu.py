"""What the driver seam promises, asked of a real GPU in a process of its own each time: a broken context must not reach the other tests.

The processes run side by side, but for the one that measures: most of their time is torch's start.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.predictor.worker.conftest import ROOT

pytestmark = pytest.mark.gpu
OPEN = """
import mmap, os, threading, torch
from contracts.functions import FunctionClass
from predictor.worker.devices.driver import connect
driver = connect("quota", FunctionClass.LATENCY_SENSITIVE, 0, 0)
"""
PROMISES = {
    "shared memory that is mapped read only is pinned": """
fd = os.memfd_create("weights"); os.write(fd, bytes(range(256)) * 4096)
access = mmap.PROT_READ if driver.registers_read_only else mmap.PROT_READ | mmap.PROT_WRITE
host = torch.frombuffer(mmap.mmap(fd, 1 << 20, prot=access), dtype=torch.uint8)
assert driver.register(host)
device = driver.allocate(1 << 20)
driver.copy(device, host, driver.copies)
event = driver.event(); event.record(driver.copies); event.synchronize()
assert torch.equal(device.cpu(), host)
driver.unregister(host)
""",
    "a pin that is refused leaves no error behind": """
memory = torch.frombuffer(mmap.mmap(-1, 1 << 16), dtype=torch.uint8)
driver.registers_read_only = False
assert driver.register(memory)
assert not driver.register(memory)
assert int(torch.ones(4, device="cuda").add_(1).sum()) == 8
driver.unregister(memory)
""",
    "memory is pinned and let go by a thread that never asked CUDA for anything": """
memory = torch.frombuffer(mmap.mmap(-1, 1 << 20), dtype=torch.uint8)
driver.registers_read_only = False
found = []
thread = threading.Thread(target=lambda: found.append(driver.register(memory))); thread.start(); thread.join()
assert found == [True] and memory.is_pinned()
thread = threading.Thread(target=lambda: driver.unregister(memory)); thread.start(); thread.join()
assert not memory.is_pinned()
""",
    "compute waits for a copy and the host does not": """
host, device = driver.pinned(1 << 30).fill_(3), driver.allocate(1 << 30)
device.zero_(); torch.cuda.synchronize()
driver.copy(device, host, driver.copies)
arrived = driver.event(); arrived.record(driver.copies)
assert not arrived.query(), "the host waited"
arrived.wait(driver.compute)
assert int(device[-1]) == 3
""",
    "a graph holds addresses and runs nothing when it is captured": """
x, y = torch.zeros(4, device="cuda"), torch.ones(4, device="cuda")
x + y; torch.cuda.synchronize()
graph, out = driver.capture(lambda: x + y)
x.fill_(5); graph.replay(); torch.cuda.synchronize()
assert out.tolist() == [6] * 4
""",
    "a capture that would make the host wait is refused and leaves the device as it was": """
x = torch.ones(4, device="cuda")
try: driver.capture(lambda: x.sum().item())
except RuntimeError as failure: assert driver.survives(failure), failure
else: raise AssertionError("captured")
graph, out = driver.capture(lambda: x * 2)
graph.replay(); torch.cuda.synchronize()
assert out.tolist() == [2] * 4
""",
    "a capture that CUDA breaks is given up, and the next one works": """
x = torch.ones(4, device="cuda")
try: driver.capture(lambda: (x * 2, torch.cuda.synchronize()))
except RuntimeError as failure: assert driver.survives(failure), failure
else: raise AssertionError("captured")
graph, out = driver.capture(lambda: x * 3)
graph.replay(); torch.cuda.synchronize()
assert out.tolist() == [3] * 4
""",
    "a model's graph answers as its eager run, bit for bit, with the weights that lie there when it is replayed": """
from contracts.functions import ModelFormat, ModelRef
from models import catalogue, networks
from models.samples import sample_inputs
def drawn(scale):
    with torch.inference_mode():
        for tensor in weights: tensor.uniform_(0.001, scale)
for source in ("mlp", "cnn", "resnet50", "bert-base?num_hidden_layers=2", "gpt2?n_layer=2", "vit-b?num_hidden_layers=2"):
    torch.manual_seed(1)
    module = networks.construct(catalogue.parse(source).config).to_empty(device="cuda").eval()
    weights = [tensor for tensor in (*module.parameters(), *module.buffers()) if tensor.is_floating_point()]
    arrays = sample_inputs(ModelRef(ModelFormat.CATALOG, source), 2, seed=1).values()
    inputs, expected = [torch.from_numpy(array).cuda() for array in arrays], []
    run = torch.inference_mode()(lambda: module(*inputs))
    for scale in (0.02, 0.03, 0.05):
        drawn(scale); expected.append(run())
    torch.cuda.synchronize()
    graph, out = driver.capture(run)
    torch.manual_seed(1)
    for scale, want in zip((0.02, 0.03, 0.05), expected):
        drawn(scale); graph.replay(); torch.cuda.synchronize()
        assert torch.equal(out.view(torch.int32), want.view(torch.int32)), source
""",
    "another thread may copy while a graph is captured": """
x, host, device = torch.ones(4, device="cuda"), driver.pinned(1 << 26), driver.allocate(1 << 26)
stop = threading.Event()
def copying():
    while not stop.is_set():
        driver.copy(device, host, driver.copies)
        event = driver.event(); event.record(driver.copies); event.synchronize()
thread = threading.Thread(target=copying); thread.start()
x * 2; torch.cuda.synchronize()
try:
    for _ in range(50):
        graph, out = driver.capture(lambda: x * 2)
        graph.replay(); graph.reset()
finally:
    stop.set(); thread.join()
""",
    "too little memory is survived and its bound is kept": """
driver.bound(256 << 20)
try: driver.allocate(512 << 20)
except torch.OutOfMemoryError as failure: assert driver.survives(failure)
else: raise AssertionError("allocated")
driver.allocate(64 << 20)
""",
    "a bad index is not survived": """
try: torch.zeros(4, device="cuda")[torch.tensor([9], device="cuda")].cpu()
except RuntimeError as failure: assert not driver.survives(failure); assert not driver.alive()
else: raise AssertionError("no error")
os._exit(0)
""",
    "the occupancy kernel is bounded by arithmetic and takes some milliseconds": """
from predictor.worker.devices.proof import occupancy_ns
times = [occupancy_ns(driver) for _ in range(5)]
assert max(times) < 1.1 * min(times), times
assert min(times) > 200_000, times
print(times, driver.sms, driver.name)
""",
}


MEASURES = "the occupancy kernel is bounded by arithmetic and takes some milliseconds"


def begin(promise: str) -> subprocess.Popen[str]:
    code = OPEN + PROMISES[promise]
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.fixture(scope="module")
def begun(gpu: None) -> Iterator[dict[str, subprocess.Popen[str]]]:
    processes = {promise: begin(promise) for promise in PROMISES if promise != MEASURES}
    yield processes
    for process in processes.values():
        process.kill()
        process.communicate()


@pytest.mark.parametrize("promise", [promise for promise in PROMISES if promise != MEASURES])
def test_the_driver_keeps_its_promises(promise: str, begun: dict[str, subprocess.Popen[str]]) -> None:
    said, _ = begun[promise].communicate(timeout=120)
    assert begun[promise].returncode == 0, said


def test_the_occupancy_kernel_measures(begun: dict[str, subprocess.Popen[str]]) -> None:
    for process in begun.values():
        process.communicate(timeout=120)
    process = begin(MEASURES)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
