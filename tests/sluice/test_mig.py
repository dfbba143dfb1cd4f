"""`sluice mig` over a driver that keeps NVML's rules, and on this machine as it is."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from click.testing import CliRunner, Result

from nodeagent.shell.nvml import Nvml
from sluice import mig
from tests.nodeagent.fake_nvml import FakeGpu, FakeNvml

Run = Callable[..., Result]


@pytest.fixture
def gpus() -> list[FakeGpu]:
    return [FakeGpu(0), FakeGpu(1, mig=False), FakeGpu(2)]


@pytest.fixture
def run(gpus: list[FakeGpu], monkeypatch: pytest.MonkeyPatch) -> Run:
    library = FakeNvml(*gpus)
    monkeypatch.setattr(mig, "Nvml", lambda: Nvml(library))
    return lambda *arguments: CliRunner().invoke(mig.command, arguments)


def test_plan_names_gpus_as_the_driver_counts_them(run: Run) -> None:
    done = run("plan", "--function", "a=70Gi", "--function", "b=35Gi@40", "--json")
    assert done.exit_code == 0, done.output
    assert sorted((one["gpu"], one["function"], one["profile"]["name"]) for one in json.loads(done.output)) == [
        (0, "a", "7g.80gb"),
        (2, "b", "3g.40gb"),
    ]


def test_apply_changes_nothing_without_yes(run: Run, gpus: list[FakeGpu]) -> None:
    done = run("apply", "--function", "a=5Gi")
    assert done.exit_code == 0, done.output
    assert "would make 1g.10gb at slice 6 for a" in done.output
    assert not gpus[0].instances


def test_apply_makes_what_was_planned_once(run: Run, gpus: list[FakeGpu]) -> None:
    first, second = (run("apply", "--function", "a=5Gi", "--yes") for _ in range(2))
    assert (first.exit_code, second.exit_code) == (0, 0), first.output + second.output
    assert "made 1g.10gb at slice 6 for a" in first.output
    assert "nothing to do" in second.output
    assert len(gpus[0].instances) == 1
    assert "MIG-0-1" in run("show").output


def test_show_says_why_a_gpu_cannot_be_cut(run: Run) -> None:
    assert "MIG mode is off" in run("show").output


def test_a_gpu_in_use_ends_apply_with_its_process(run: Run, gpus: list[FakeGpu]) -> None:
    gpus[0].processes.append(99)
    done = run("apply", "--function", "a=5Gi", "--yes")
    assert done.exit_code == 1
    assert "in use by process 99" in done.output


@pytest.mark.parametrize(
    ("value", "message"),
    [("a", "NAME=SIZE"), ("a=lots", "lots"), ("a=5Gi@0", "1 to 100"), ("a=5Gi@200", "1 to 100")],
)
def test_a_wrong_function_is_named(run: Run, value: str, message: str) -> None:
    done = run("plan", "--function", value)
    assert done.exit_code == 2
    assert message in done.output


def test_a_function_given_twice_is_refused(run: Run) -> None:
    assert "once" in run("plan", "--function", "a=1Gi", "--function", "a=2Gi").output


def test_without_mig_mode_the_way_to_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mig, "Nvml", lambda: Nvml(FakeNvml(FakeGpu(0, mig=False))))
    done = CliRunner().invoke(mig.command, ["plan", "--function", "a=1Gi"])
    assert done.exit_code == 1
    assert "nvidia-smi -i N -mig 1" in done.output


def test_a_machine_without_a_driver_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mig, "Nvml", lambda: Nvml(FakeNvml(driver=False)))
    done = CliRunner().invoke(mig.command, ["show"])
    assert done.exit_code == 1
    assert "no NVIDIA driver" in done.output
