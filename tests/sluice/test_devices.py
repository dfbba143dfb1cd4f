"""GPUs on the command line: which devices a node serves on, what its agent is told, and what people are shown of how lanes are held."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

from contracts.errors import InvalidValue, Unavailable
from contracts.functions import FunctionClass
from contracts.status import DeviceStatus, LaneStatus, NodeStatus
from nodeagent.shell.options import Options, parse
from sluice import status
from sluice.cli import main
from sluice.plan import Plan, default_device_memory, default_devices

FAKE = (sys.executable, "-m", "tests.fakes.gpus")
PLAN = Plan((), Path("/tmp/run"), ("cuda:0", "cuda:MIG-1a"), 0, 1 << 30, None, 1, "127.0.0.1", 8080, isolate=False, idle_s=60.0)


@pytest.fixture
def dev(tmp_path: Path) -> Path:
    """A /dev of a machine with a GPU."""
    (tmp_path / "nvidia0").touch()
    return tmp_path


def test_all_gpus_are_served_on_and_the_cpu_where_there_is_none(tmp_path: Path, dev: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("FAKE_GPUS", "2")
    assert default_devices(dev, FAKE) == ("cuda:0", "cuda:1")
    monkeypatch.setenv("FAKE_GPUS", "0")
    assert default_devices(dev, FAKE) == ("cpu:0",), "none is visible"
    (tmp_path / "nvidia0").unlink()
    (tmp_path / "nvidiactl").touch()
    assert default_devices(tmp_path, ("/nonexistent/program",)) == ("cpu:0",), "nobody need be asked"


def test_a_gpu_whose_driver_does_not_work_is_not_passed_over_in_silence(dev: Path) -> None:
    with pytest.raises(Unavailable, match=r"does not work: no driver; serve without GPUs with --device cpu:0"):
        default_devices(dev, (sys.executable, "-c", "import sys; sys.exit('no driver')"))


def test_memory_that_nobody_names() -> None:
    assert default_device_memory(("cuda:0", "cuda:1")) == 0
    assert default_device_memory(("cpu:0",)) > 0
    with pytest.raises(InvalidValue, match="must be named where GPUs and CPU devices serve together"):
        default_device_memory(("cuda:0", "cpu:0"))


def told(plan: Plan) -> Options:
    """What an agent understands of a plan."""
    return parse(plan.agent_arguments())


def test_the_agent_is_told_what_is_to_hold_lanes() -> None:
    options = told(PLAN)
    assert (options.devices, options.device_bytes, options.sm_backend, options.require_limits) == (("cuda:0", "cuda:MIG-1a"), 0, "auto", False)
    options = told(replace(PLAN, sm_backend="green", require_limits=True))
    assert (options.sm_backend, options.require_limits) == ("green", True)


WRONG = {
    "no such kind of device": ("--device", "gpu:0"),
    "a UUID that is none": ("--device", "cuda:XYZ-1"),
    "auto beside another": ("--device", "auto", "--device", "cuda:0"),
    "a backend that is none": ("--sm-backend", "partitions"),
}


@pytest.mark.parametrize("options", WRONG.values(), ids=WRONG)
def test_a_wrong_option_is_named(options: tuple[str, ...], tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["up", str(tmp_path / "f.yaml"), *options])
    assert result.exit_code == 2
    assert options[1] in result.output


WRONG_AGENT = {
    "a CPU device without memory": (("--device", "cpu:0"), "--device-memory: must be greater than 0"),
    "a run dir too long for the sockets of MPS": (("--device", "cuda:0", "--run-dir", "/tmp/" + "x" * 80), "too long for the sockets of MPS"),
    "a device that is none": (("--device", "cuda:first"), "must look like cpu:0 or cuda:0"),
}


@pytest.mark.parametrize(("arguments", "reason"), WRONG_AGENT.values(), ids=WRONG_AGENT)
def test_an_agent_refuses_what_cannot_work(arguments: tuple[str, ...], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--run-dir", "/tmp/run", "--host-memory", "1Gi", *arguments])
    assert reason in capsys.readouterr().err


def test_people_are_shown_what_holds_lanes_and_that_a_device_is_lost(capsys: pytest.CaptureFixture[str]) -> None:
    device = DeviceStatus("cuda:0", 1 << 30, 0, 0, 0, 0, 0, (), backend="quota", why="no MPS: none; no green contexts: none")
    lost = msgspec.structs.replace(device, device="cuda:1", backend="mps", state="lost")
    cpu = msgspec.structs.replace(device, device="cpu:0", backend="pace")
    lane = LaneStatus(1, 100, FunctionClass.LATENCY_SENSITIVE, 7, "idle", attached=5, unpinned=2)
    device = msgspec.structs.replace(device, lanes=(lane,))
    status.console().print(status.render(NodeStatus(1, 2, 3, 4, (device, lost, cpu), ())))
    shown = capsys.readouterr().out
    assert "cuda:0: SMs are held by quota: no MPS: none; no green contexts: none" in shown
    assert "cuda:1 is lost: it is being brought back" in shown
    assert "cuda:0: the weights of 2 functions cannot be pinned" in shown
    assert "cuda:1: the weights" not in shown
    assert "cpu:0:" not in shown
