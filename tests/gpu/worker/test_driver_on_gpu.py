"""What the driver seam promises, asked of a real GPU in a process of its own each time: a broken context must not reach the other tests."""

from __future__ import annotations

import subprocess
import sys

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


@pytest.mark.parametrize("promise", PROMISES.values(), ids=PROMISES)
def test_the_driver_keeps_its_promises(promise: str) -> None:
    done = subprocess.run([sys.executable, "-c", OPEN + promise], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
