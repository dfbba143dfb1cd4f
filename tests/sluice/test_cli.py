from __future__ import annotations

import json
import os
import resource
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from contracts.functions import FunctionClass, Share
from contracts.status import DeviceStatus, FunctionStatus, LaneStatus, LatencyStatus, NodeStatus
from contracts.units import S
from sluice import doctor, status
from sluice.cli import main


def sluice(*arguments: str) -> Any:
    return CliRunner().invoke(main, arguments)


@pytest.mark.parametrize("command", [(), ("up",), ("status",), ("share",), ("doctor",)], ids=lambda command: " ".join(command) or "sluice")
def test_help_shows_examples(command: tuple[str, ...]) -> None:
    result = sluice(*command, "--help")

    assert result.exit_code == 0
    assert f"Examples:\n    sluice {' '.join(command)}".rstrip() in result.output


WRONG_OPTIONS = {
    "a device that is none": (("--device", "tpu:0"), "tpu:0"),
    "a device twice": (("--device", "cpu:0", "--device", "cpu:0"), "once"),
    "a size that is none": (("--device-memory", "lots"), "'lots'"),
    "no memory": (("--device-memory", "0"), "greater than 0"),
    "a port that is none": (("--port", "70000"), "70000"),
    "a demo without time": (("--demo", "0"), "--demo"),
}


@pytest.mark.parametrize(("options", "word"), WRONG_OPTIONS.values(), ids=WRONG_OPTIONS)
def test_a_wrong_option_is_named_with_its_value(tmp_path: Path, options: tuple[str, ...], word: str) -> None:
    result = sluice("up", str(tmp_path / "f.yaml"), *options)

    assert result.exit_code == 2
    assert word in result.output


def test_a_file_that_is_not_there_is_an_error_in_one_line(tmp_path: Path) -> None:
    result = sluice("up", str(tmp_path / "f.yaml"), "--run-dir", str(tmp_path / "run"))

    assert result.exit_code == 1
    assert result.stderr == f"sluice: {tmp_path}/f.yaml: cannot be read: No such file or directory\n"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", [("status",), ("status", "--json"), ("status", "--watch"), ("share", "a", "--sm", "1")], ids=" ".join)
def test_without_a_node_it_says_so(tmp_path: Path, command: tuple[str, ...]) -> None:
    result = sluice(*command, "--run-dir", str(tmp_path))

    assert result.exit_code == 1
    assert f"sluice: no node runs at {tmp_path}" in result.stderr


def test_share_wants_something_to_change(tmp_path: Path) -> None:
    assert sluice("share", "a", "--run-dir", str(tmp_path)).exit_code == 2


class TestStatus:
    FUNCTION = FunctionStatus(
        key="team/a", cls=FunctionClass.BEST_EFFORT, state="failed", share=Share(40, 1250), slo_ms=200, weight_bytes=3 << 20, resident_on=("cpu:0",),
        queued=3, rate=1.5, latency=LatencyStatus(1.25, 20, 300), answered=8, failed=2, refused=0, retried=0, slo_met=6, swaps=5, gpu_ns=3 * S,
        reason="the file is torn",
    )  # fmt: skip
    DEVICE = DeviceStatus("cpu:0", 64 << 20, 3 << 20, 4 * S, 5 << 20, 5, 40, (LaneStatus(1, 40, FunctionClass.BEST_EFFORT, 77, "paused"),))
    NODE = NodeStatus(1, 2 * S, 3 << 20, 1 << 30, (DEVICE,), (FUNCTION,))

    def test_every_figure_is_there_even_in_a_pipe(self, capsys: pytest.CaptureFixture[str]) -> None:
        status.console().print(status.render(self.NODE))

        words = [
            "team/a",
            "BE",
            "failed: the file is torn",
            "40 x 12.5 %",
            "1.2/20/300",
            "200",
            "75.0 %",
            "3.00",
            "40 % BE paused",
            "3.0 MiB of 64.0 MiB",
        ]
        shown = capsys.readouterr().out
        assert [word for word in words if word not in shown] == []

    def test_watch_shows_news_until_it_is_interrupted(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(status, "_REFRESH_S", 0)
        reads = iter([self.NODE, self.NODE])

        def read() -> NodeStatus:
            try:
                return next(reads)
            except StopIteration:
                raise KeyboardInterrupt from None

        status.watch(read)

        assert "team/a" in capsys.readouterr().out
        assert next(reads, None) is None


class TestDoctor:
    def test_this_machine_can_serve(self, tmp_path: Path) -> None:
        result = sluice("doctor", "--json", "--run-dir", str(tmp_path / "run"))

        checks = {check["name"]: check for check in json.loads(result.stdout)}
        assert result.exit_code == 0, checks
        assert "torch" in checks
        assert "works" in checks["memory by descriptor"]["found"]
        assert "cpu:0" in checks["devices"]["found"]
        assert not (tmp_path / "run").exists()

    @pytest.fixture
    def few_files(self) -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (512, before[1]))
        yield
        resource.setrlimit(resource.RLIMIT_NOFILE, before)

    def test_few_open_files_are_a_warning_with_advice(self, few_files: None) -> None:
        check = doctor._open_files()

        assert (check.outcome, check.found[:3]) == (doctor.WARN, "512")
        assert "ulimit -n" in check.advice

    def test_a_failing_check_fails_the_command(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "run").mkdir(mode=0o755)
        monkeypatch.setattr(doctor, "_torch", lambda: doctor.Check("torch", doctor.OK, "not looked at"))

        result = sluice("doctor", "--run-dir", str(tmp_path / "run"))

        assert result.exit_code == 1
        assert f"chmod 700 {tmp_path}/run" in result.stdout.replace("\n", "")

    def test_a_running_node_is_noticed(self, tmp_path: Path) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.bind(str(tmp_path / "control.sock"))
            listener.listen()
            assert doctor._sockets(tmp_path).outcome == doctor.WARN
        assert doctor._sockets(tmp_path).outcome == doctor.OK

    def test_it_leaves_nothing_open(self, tmp_path: Path) -> None:
        before = os.listdir("/proc/self/fd")
        for check in (doctor._descriptors, lambda: doctor._sockets(tmp_path), lambda: doctor._run_dir(tmp_path), doctor._devices):
            check()
        assert os.listdir("/proc/self/fd") == before
        assert list(tmp_path.iterdir()) == []
