"""What is known of a GPU before anything runs on it: the driver's answers, a machine's PCI tree, and the process that asks."""

from __future__ import annotations

import ctypes
import os
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest

from contracts.errors import InvalidValue, Unavailable
from nodeagent.shell import cuda_driver
from nodeagent.shell.gpus import find_gpu, find_gpus, host_link, near_cpus
from tests.fakes import gpu

FAKE = (sys.executable, "-m", "tests.fakes.gpus")
WHOLE, INSTANCE, OTHER = uuid.UUID(int=1), uuid.UUID(int=2), uuid.UUID(int=3)


class FakeDriver:
    """libcuda.so.1 as its documentation has it: every call returns a status and writes through pointers. `fails` names a call that does not work.

    `p2p`: what it says of attributes between devices, by number, and 0 of others.
    """

    def __init__(self, devices: int = 1, *, mig: bool = False, fails: str = "", code: int = 999, p2p: dict[int, int] | None = None) -> None:
        self.devices, self.mig, self.fails, self.code, self.p2p = devices, mig, fails, code, p2p or {}

    def __getattr__(self, call: str) -> Any:
        def answer(*arguments: Any) -> int:
            if call == self.fails:
                return self.code
            FakeDriver.__dict__[f"_{call}"](self, *arguments)
            return 0

        return answer

    def _cuInit(self, flags: int) -> None:
        assert flags == 0

    def _cuGetErrorName(self, code: Any, text: Any) -> None:
        text._obj.value = b"CUDA_ERROR_UNKNOWN"

    def _cuDriverGetVersion(self, version: Any) -> None:
        version._obj.value = 13010

    def _cuDeviceGetCount(self, count: Any) -> None:
        count._obj.value = self.devices

    def _cuDeviceGet(self, device: Any, index: ctypes.c_int) -> None:
        device._obj.value = index.value

    def _cuDeviceGetName(self, name: Any, length: ctypes.c_int, device: Any) -> None:
        name.value = b"NVIDIA H100 MIG 1g.10gb" if self.mig else b"NVIDIA H100"

    def _cuDeviceGetPCIBusId(self, bus_id: Any, length: ctypes.c_int, device: ctypes.c_int) -> None:
        bus_id.value = f"0000:{0xA0 + device.value:X}:00.0".encode()

    def _cuDeviceTotalMem_v2(self, total: Any, device: Any) -> None:
        total._obj.value = 80 << 30

    def _cuDeviceGetUuid_v2(self, found: Any, device: ctypes.c_int) -> None:
        found.raw = (INSTANCE if self.mig else OTHER if device.value else WHOLE).bytes

    def _cuDeviceGetAttribute(self, value: Any, attribute: ctypes.c_int, device: Any) -> None:
        value._obj.value = {16: 132, 75: 9, 76: 0}[attribute.value]

    def _cuDeviceGetP2PAttribute(self, value: Any, attribute: ctypes.c_int, reader: ctypes.c_int, read: ctypes.c_int) -> None:
        assert reader.value != read.value
        value._obj.value = self.p2p.get(attribute.value, 0)


def test_the_driver_s_answers_are_read() -> None:
    first, second = cuda_driver.read(FakeDriver(2))
    assert first == {
        "uuid": f"GPU-{WHOLE}",
        "name": "NVIDIA H100",
        "sms": 132,
        "capability": [9, 0],
        "total_bytes": 80 << 30,
        "driver": 13010,
        "bus_id": "0000:a0:00.0",
        "mig": False,
        "peers": [],
    }
    assert second["bus_id"] == "0000:a1:00.0"


@pytest.mark.parametrize(
    ("driver", "linked"),
    [
        (FakeDriver(2, p2p={2: 1, 3: 1}), True),
        (FakeDriver(2, p2p={2: 1}), False),
        (FakeDriver(2, p2p={3: 1}), False),
        (FakeDriver(2, p2p={2: 1, 3: 1}, fails="cuDeviceGetP2PAttribute"), False),
    ],
    ids=["over NVLink", "over PCIe", "no access", "a driver that does not say"],
)
def test_gpus_are_linked_where_one_reads_the_other_over_a_link_of_their_own(driver: FakeDriver, linked: bool) -> None:
    first, second = cuda_driver.read(driver)
    assert first["peers"] == ([f"GPU-{OTHER}"] if linked else [])
    assert second["peers"] == ([f"GPU-{WHOLE}"] if linked else [])


def test_a_mig_instance_goes_by_its_own_identity() -> None:
    (found,) = cuda_driver.read(FakeDriver(mig=True))
    assert found["uuid"] == f"MIG-{INSTANCE}" and found["mig"]


def test_no_device_is_no_error_and_a_driver_that_does_not_work_is_one() -> None:
    assert cuda_driver.read(FakeDriver(fails="cuInit", code=100)) == []
    with pytest.raises(cuda_driver.DriverError, match=r"cuDeviceTotalMem failed: CUDA_ERROR_UNKNOWN \(999\)"):
        cuda_driver.read(FakeDriver(fails="cuDeviceTotalMem_v2"))


@pytest.mark.asyncio
async def test_a_device_is_found_by_number_or_uuid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("FAKE_GPUS", "3")
    assert (await find_gpu(FAKE, "cuda:2")).uuid == gpu.uuid(2)
    assert (await find_gpu(FAKE, f"cuda:{gpu.uuid(1)}")).uuid == gpu.uuid(1)
    with pytest.raises(InvalidValue, match="3 are visible"):
        await find_gpu(FAKE, "cuda:3")
    with pytest.raises(InvalidValue, match="0 are visible"):
        await find_gpu(FAKE, f"cuda:{gpu.uuid(9)}")


BROKEN = {
    "a program that is not there": (("/nonexistent/program",), "cannot be asked"),
    "a driver that does not work": ((sys.executable, "-c", "import sys; sys.exit('cuInit failed')"), "does not work: cuInit failed"),
    "one that dies without a word": ((sys.executable, "-c", "import os; os._exit(9)"), "does not work: exit 9"),
    "nonsense": ((sys.executable, "-c", "print('[{]')"), "not understood"),
}


@pytest.mark.asyncio
@pytest.mark.parametrize(("command", "reason"), BROKEN.values(), ids=BROKEN)
async def test_a_driver_that_cannot_be_asked_is_a_clear_error(command: tuple[str, ...], reason: str) -> None:
    with pytest.raises(Unavailable, match=reason):
        await find_gpus(command)


@pytest.mark.skipif(any(Path("/dev").glob("nvidia[0-9]*")), reason="this machine has a GPU")
@pytest.mark.asyncio
async def test_the_real_program_finds_no_gpu_without_a_driver() -> None:
    assert await find_gpus((sys.executable, "-m", "nodeagent.shell.cuda_driver")) == []


def tree(root: Path, path: str, numa: str, cpus: str) -> Path:
    """A device in a PCI tree; returns the folder of links to devices."""
    device = root / "devices" / path
    device.mkdir(parents=True)
    (device / "numa_node").write_text(f"{numa}\n")
    (device / "local_cpulist").write_text(f"{cpus}\n")
    links = root / "bus"
    links.mkdir(exist_ok=True)
    (links / device.name).symlink_to(device)
    return links


def test_devices_behind_one_root_port_share_its_link(tmp_path: Path) -> None:
    tree(tmp_path, "pci0000:00/0000:00:01.0/0000:01:00.0/0000:02:00.0/0000:03:00.0", "0", "0-3")
    tree(tmp_path, "pci0000:00/0000:00:01.0/0000:01:00.0/0000:02:08.0/0000:04:00.0", "0", "0-3")
    links = tree(tmp_path, "pci0000:80/0000:80:01.0/0000:81:00.0", "1", "4-7")
    assert host_link("0000:03:00.0", links) == host_link("0000:04:00.0", links) == "pci-0000:00:01.0"
    assert host_link("0000:81:00.0", links) == "pci-0000:80:01.0"
    assert host_link("0000:ff:00.0", links) == "pci-0000:ff:00.0", "one that is not known has its own"


def test_the_processors_of_a_device_s_numa_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)))
    tree(tmp_path, "pci0/a", "1", "4-7,10,20")
    tree(tmp_path, "pci0/b", "-1", "0-11")
    tree(tmp_path, "pci0/c", "0", "0-63")
    links = tree(tmp_path, "pci0/d", "2", "90-99")
    assert near_cpus("a", links) == (4, 5, 6, 7, 10)
    assert near_cpus("b", links) == (), "no node is known"
    assert near_cpus("c", links) == (), "all are near"
    assert near_cpus("d", links) == (), "none may be used"
    assert near_cpus("e", links) == ()
