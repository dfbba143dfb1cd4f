"""The doctor on fake GPUs: a whole agent serves on them, and a lane has to prove its cap or is refused."""

from __future__ import annotations

import sys

import pytest

from contracts.functions import Function, ModelFormat, ModelRef
from nodeagent.shell.nvml import Nvml
from sluice import doctor_gpus
from sluice.doctor import FAIL, OK, WARN, Check
from sluice.doctor_gpus import Commands, examine
from tests.fakes import gpu
from tests.nodeagent.fake_nvml import FakeGpu, FakeNvml

COMMANDS = Commands(
    gpus=(sys.executable, "-m", "tests.fakes.gpus"),
    link=(sys.executable, "-m", "tests.fakes.link"),
    agent=(sys.executable, "-m", "tests.fakes.gpu_agent"),
)


class Driver(FakeNvml):
    """NVML's GPUs are the fake ones."""

    def nvmlDeviceGetUUID(self, handle: FakeGpu) -> str:
        return gpu.uuid(handle.index)


@pytest.fixture(autouse=True)
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_GPUS", "1")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(doctor_gpus, "_SLAB_BYTES", 16 << 20)
    monkeypatch.setattr(doctor_gpus, "_MODEL", Function("doctor", ModelRef(ModelFormat.TORCH_EXPORT, "file:///add?value=1")))


def look(sm_backend: str = "auto", require_limits: bool = False, compute_mode: int = 0) -> dict[str, Check]:
    library = Driver(FakeGpu(0, mig=False, compute_mode=compute_mode))
    return {check.name: check for check in examine(sm_backend, require_limits, COMMANDS, lambda: Nvml(library))}


def test_a_gpu_that_can_be_held_is_proven_by_a_lane() -> None:
    found = look()
    assert "Fake H100, 132 SMs" in found["cuda:0"].found
    assert "driver 570.86.15, CUDA 13.0" in found["cuda:0"].found
    assert "55.0 GB/s to the device, 52.0 GB/s back" in found["cuda:0 link"].found
    assert found["cuda:0 modes"] == Check("cuda:0 modes", OK, "compute mode default, MIG off")
    limits = found["cuda:0 limits"]
    assert limits.outcome == OK, limits
    assert "held by mps" in limits.found
    assert "proven" in limits.found


@pytest.mark.parametrize(("required", "outcome"), [(False, WARN), (True, FAIL)])
def test_a_limit_that_nothing_enforces_fails_where_it_is_required(required: bool, outcome: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_MPS", "absent")
    monkeypatch.setenv("FAKE_DRIVER", "12000")
    limits = look(require_limits=required)["cuda:0 limits"]
    assert limits.outcome == outcome, limits
    assert "held by quota" in limits.found
    assert "only sm-percent 100 is served" in limits.found


def test_a_backend_that_was_asked_for_and_cannot_be_had_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_MPS", "absent")
    limits = look("mps")["cuda:0 limits"]
    assert limits.outcome == FAIL
    assert "MPS was asked for" in limits.found


def test_copies_that_cannot_be_measured_fail_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_LINK", "broken")
    link = look()["cuda:0 link"]
    assert link.outcome == FAIL
    assert "no CUDA device is available" in link.found


def test_a_gpu_that_takes_no_work_is_said() -> None:
    assert look(compute_mode=2)["cuda:0 modes"].outcome == FAIL


def test_without_a_gpu_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_GPUS", "0")
    assert list(look()) == ["GPU"]


def test_a_driver_that_does_not_work_fails() -> None:
    (found,) = examine("auto", False, Commands(gpus=(sys.executable, "-c", "import sys; sys.exit('broken')")))
    assert found.outcome == FAIL
    assert "broken" in found.found
