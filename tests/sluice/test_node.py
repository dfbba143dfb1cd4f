"""A whole node, everything real: `sluice up` as a process, small models, the command line against it, faults, and what is left afterwards."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from click.testing import CliRunner

from nodeagent.shell.hoststore import store_folder
from sluice.cli import main
from sluice.ports import free_port
from tests.faults.census import alive, command

ROOT = Path(__file__).parents[2]
WITHIN_S = 200.0


def document(name: str, catalog: str, **notes: str) -> str:
    lines = "".join(f'\n    sluice.dev/{key.replace("_", "-")}: "{value}"' for key, value in {"catalog": catalog, **notes}.items())
    return (
        f"apiVersion: serving.kserve.io/v1beta1\nkind: InferenceService\nmetadata:\n  name: {name}\n  annotations:{lines}\n"
        "spec: {predictor: {model: {runtime: sluice, modelFormat: {name: sluice-catalog}}}}\n---\n"
    )


TWO = document("mlp-a", "mlp?features=4&seed=1", quota_percent="5") + document("mlp-b", "mlp?features=4&seed=2", quota_percent="5")


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WITHIN_S
    while not condition():
        assert time.monotonic() < deadline, "not within the deadline"
        time.sleep(0.02)


class Node:
    """`sluice up` as a user runs it, its JSON lines, and every process it ever had."""

    def __init__(self, folder: Path, documents: str, *options: str, for_people: bool = False) -> None:
        self.run_dir = folder / "run"
        (folder / "functions.yaml").write_text(documents)
        limits = ("--device-memory", "32Mi", "--host-memory", "256Mi", "--port", "0", "--run-dir", str(self.run_dir))
        form = () if for_people else ("--json",)
        self.log = folder / "up.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "sluice", "up", str(folder / "functions.yaml"), *limits, *form, *options],
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
            )
        self._family: dict[int, psutil.Process] = {}

    def line(self) -> Any:
        """The next JSON line; fails with the log when the process ends first."""
        assert self.process.stdout is not None
        assert select.select([self.process.stdout], [], [], WITHIN_S)[0], self.log.read_text()
        line = self.process.stdout.readline()
        assert line, self.log.read_text()
        self.remember()
        return json.loads(line)

    def remember(self) -> None:
        for process in psutil.Process(self.process.pid).children(recursive=True):
            self._family[process.pid] = process

    def children(self, word: str) -> list[psutil.Process]:
        """The direct children whose command line holds `word`."""
        return [child for child in psutil.Process(self.process.pid).children() if word in command(child)]

    def child(self, word: str) -> psutil.Process:
        """The only one."""
        (found,) = self.children(word)
        return found

    def end(self, number: int = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                self.remember()
            self.process.send_signal(number)
        code = self.process.wait(WITHIN_S)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code

    def left_behind(self) -> list[str]:
        """Whatever of the node is still there: files, shared memory, processes."""
        paths = [str(path) for path in (self.run_dir, store_folder(self.run_dir)) if path.exists()]
        return paths + [f"process {process.pid} {command(process)}" for process in self._family.values() if alive(process)]


def infer(url: str, name: str, value: float = 1.0) -> tuple[dict[str, Any], dict[str, str]]:
    inputs = [{"name": "features", "shape": [1, 4], "datatype": "FP32", "data": [value] * 4}]
    request = urllib.request.Request(f"{url}/v2/models/{name}/infer", json.dumps({"inputs": inputs}).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=WITHIN_S) as response:
        return json.loads(response.read()), dict(response.headers)


def serves(url: str, name: str) -> bool:
    try:
        return bool(infer(url, name)[0]["outputs"])
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def sluice(*arguments: str) -> Any:
    return CliRunner().invoke(main, arguments)


class TestServing:
    """One node for all of these, in order: the last ones hurt it."""

    @pytest.fixture(scope="class")
    @classmethod
    def started(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Node, Any]]:
        node = Node(tmp_path_factory.mktemp("node"), TWO)
        ready = node.line()
        yield node, ready
        code = node.end()
        assert (code, node.left_behind()) == (0, []), node.log.read_text()

    def test_it_says_where_it_serves(self, started: tuple[Node, Any]) -> None:
        node, ready = started
        assert ready["functions"] == ["default/mlp-a", "default/mlp-b"]
        assert ready["failed"] == {}
        assert ready["pid"] == node.process.pid

    def test_each_function_answers_with_its_own_weights(self, started: tuple[Node, Any]) -> None:
        url = started[1]["url"]
        answers = [infer(url, name)[0] for name in ("mlp-a", "mlp-b", "mlp-a")]

        data = [answer["outputs"][0]["data"] for answer in answers]
        assert data[0] == data[2] != data[1]
        assert {"sluice_queue_ms", "sluice_swap_ms", "sluice_run_ms"} <= answers[0]["parameters"].keys()

    def test_status_shows_what_was_asked(self, started: tuple[Node, Any]) -> None:
        run_dir = str(started[0].run_dir)
        infer(started[1]["url"], "mlp-a")

        status = json.loads(sluice("status", "--json", "--run-dir", run_dir).output)
        table = sluice("status", "--run-dir", run_dir).output

        found = {entry["key"]: entry for entry in status["functions"]}
        assert found["default/mlp-a"]["answered"] >= 1
        assert found["default/mlp-a"]["state"] == "ready"
        assert "default/mlp-a" in table
        assert "cpu:0" in table

    def test_share_changes_what_is_given_and_keeps_the_rest(self, started: tuple[Node, Any]) -> None:
        run_dir = str(started[0].run_dir)

        result = sluice("share", "mlp-b", "--sm", "40", "--run-dir", run_dir)
        assert result.exit_code == 0, result.output
        assert "default/mlp-b: 100 % SM x 5 % of the time (limit 100 %) -> 40 % SM x 5 % of the time (limit 100 %)" in result.output
        result = sluice("share", "default/mlp-b", "--quota", "6", "--limit", "50", "--json", "--run-dir", run_dir)
        assert json.loads(result.output)["after"] == {"sm_percent": 40, "quota_bp": 600, "limit_bp": 5000}

        assert serves(started[1]["url"], "mlp-b")

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (("nobody", "--sm", "10"), ["'nobody'", "default/mlp-a"]),
            (("mlp-a", "--sm", "101"), ["sm-percent", "101"]),
            (("mlp-a", "--quota", "0.001"), ["quota-percent", "0.001"]),
            (("mlp-a", "--quota", "99.99"), ["default/mlp-a"]),
        ],
        ids=["an unknown function", "a bad SM", "a bad quota", "a share that the device cannot guarantee"],
    )
    def test_a_bad_share_is_refused_with_the_reason(self, started: tuple[Node, Any], arguments: tuple[str, ...], words: list[str]) -> None:
        result = sluice("share", *arguments, "--run-dir", str(started[0].run_dir))

        assert result.exit_code == 1
        assert [word for word in words if word not in result.stderr] == []

    def test_a_second_node_in_the_same_place_or_on_the_same_port_is_refused(self, started: tuple[Node, Any], tmp_path: Path) -> None:
        node, ready = started
        (tmp_path / "f.yaml").write_text(TWO)
        place = sluice("up", str(tmp_path / "f.yaml"), "--run-dir", str(node.run_dir), "--port", "0")
        other = tmp_path / "run"
        port = sluice("up", str(tmp_path / "f.yaml"), "--run-dir", str(other), "--port", ready["url"].rpartition(":")[2])

        assert (place.exit_code, port.exit_code) == (1, 1)
        assert f"process {node.process.pid}" in place.stderr
        assert "Address already in use" in port.stderr
        assert not other.exists()
        assert serves(ready["url"], "mlp-a")

    def test_it_serves_again_after_kill_9_of_the_predictor(self, started: tuple[Node, Any]) -> None:
        node, ready = started
        first = node.child("predictor")
        first.kill()

        until(lambda: not first.is_running() and serves(ready["url"], "mlp-a"))
        node.remember()

    def test_it_serves_again_after_kill_9_of_the_agent_with_the_shares_of_before(self, started: tuple[Node, Any]) -> None:
        node, ready = started
        run_dir = str(node.run_dir)
        node.remember()
        first = node.child("nodeagent")
        assert sluice("share", "mlp-b", "--sm", "30", "--run-dir", run_dir).exit_code == 0
        first.kill()

        until(lambda: not first.is_running() and serves(ready["url"], "mlp-a") and serves(ready["url"], "mlp-b"))

        node.remember()
        status = json.loads(sluice("status", "--json", "--run-dir", run_dir).output)
        shares = {entry["key"]: entry["share"]["sm_percent"] for entry in status["functions"]}
        assert shares == {"default/mlp-a": 100, "default/mlp-b": 30}


WRONG_NODES = {
    "a function that cannot be loaded": (document("a", "no-such-model"), (), ["default/a", "no-such-model"]),
    "shares that no device can guarantee": (
        document("a", "mlp?features=4", quota_percent="60") + document("b", "mlp?features=4&seed=2", quota_percent="60"),
        (),
        ["cannot be served on this node"],
    ),
    "too little host memory": (document("a", "mlp?features=4"), ("--host-memory", "1Mi"), ["default/a", "host memory"]),
    "a demo of which a function fails": (TWO + document("a", "no-such-model"), ("--demo", "1"), ["default/a", "no demo"]),
}


@pytest.mark.parametrize(("documents", "options", "words"), WRONG_NODES.values(), ids=WRONG_NODES)
def test_a_node_that_cannot_serve_says_why_and_leaves_nothing(tmp_path: Path, documents: str, options: tuple[str, ...], words: list[str]) -> None:
    node = Node(tmp_path, documents, *options)
    code = node.process.wait(WITHIN_S)
    node.end()

    log = node.log.read_text()
    assert (code, node.left_behind()) == (1, []), log
    assert [word for word in words if word not in log] == [], log


def test_a_function_that_fails_does_not_keep_the_others_from_serving(tmp_path: Path) -> None:
    node = Node(tmp_path, TWO + document("bad", "no-such-model"))
    try:
        ready = node.line()
        assert list(ready["failed"]) == ["default/bad"]
        assert serves(ready["url"], "mlp-b")
        log = node.log.read_text()
        assert "NOT served" in log
        assert "no-such-model" in log
    finally:
        code = node.end(signal.SIGINT)
    assert (code, node.left_behind()) == (0, [])


def test_a_second_signal_stops_at_once(tmp_path: Path) -> None:
    node = Node(tmp_path, TWO)
    node.line()
    node.process.send_signal(signal.SIGINT)
    code = node.end(signal.SIGINT)

    assert code == 0
    until(lambda: node.left_behind() == [])


def test_a_signal_while_it_starts_leaves_nothing(tmp_path: Path) -> None:
    node = Node(tmp_path, TWO)
    until(lambda: len(psutil.Process(node.process.pid).children()) >= 1)

    assert node.end() == 130
    until(lambda: node.left_behind() == [])


def test_kill_9_of_the_supervisor_ends_all_processes_and_the_next_one_takes_over(tmp_path: Path) -> None:
    first = Node(tmp_path, TWO)
    first.line()
    first.end(signal.SIGKILL)
    until(lambda: not [line for line in first.left_behind() if line.startswith("process")])

    second = Node(tmp_path, TWO)
    try:
        assert serves(second.line()["url"], "mlp-a")
    finally:
        code = second.end()
    assert (code, second.left_behind()) == (0, [])


def test_isolated_functions_go_to_zero_and_come_back_with_their_weights(tmp_path: Path) -> None:
    node = Node(tmp_path, TWO, "--isolate", "--idle-seconds", "0.5")
    try:
        url = node.line()["url"]
        until(lambda: not node.children("predictor"))

        cold, headers = infer(url, "mlp-a")
        node.remember()
        until(lambda: "default/mlp-a is at zero" in node.log.read_text())
        again, _ = infer(url, "mlp-a")

        assert float(headers["Sluice-Start-Ms"]) > 0
        assert {"sluice_swap_ms", "sluice_run_ms"} <= cold["parameters"].keys()
        assert again["outputs"] == cold["outputs"]
        node.remember()
    finally:
        code = node.end()
    assert (code, node.left_behind()) == (0, []), node.log.read_text()


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_the_lines_to_paste_work_as_they_stand(tmp_path: Path) -> None:
    node = Node(tmp_path, TWO, for_people=True)
    try:
        assert node.process.stdout is not None
        lines = []
        while not (lines and "Ctrl-C stops" in lines[-1]):
            lines.append(node.process.stdout.readline().decode())
            assert lines[-1], node.log.read_text()
        pasted = [line.strip() for line in lines if "curl" in line]
        answers = [json.loads(subprocess.run(["sh", "-c", line], capture_output=True, check=True).stdout) for line in pasted]
    finally:
        code = node.end()

    assert [answer["model_name"] for answer in answers] == ["mlp-a", "mlp-b"]
    assert any("default/mlp-a" in line and "latency-sensitive" in line for line in lines)
    assert (code, node.left_behind()) == (0, [])


def test_grpc_answers_as_http_does(tmp_path: Path) -> None:
    grpc_port = free_port("127.0.0.1")
    node = Node(tmp_path, TWO, "--grpc-port", str(grpc_port))
    try:
        url = node.line()["url"]
        ask = f"""
import asyncio, json, urllib.request
from kserve import InferenceGRPCClient, InferInput, InferRequest
row = {{"name": "features", "shape": [1, 4], "datatype": "FP32", "data": [0, 1, 2, 3]}}
async def main():
    async with InferenceGRPCClient("127.0.0.1:{grpc_port}") as client:
        answer = await client.infer(InferRequest("mlp-a", [InferInput(**row)]))
    body = json.dumps({{"inputs": [row]}}).encode()
    told = json.load(urllib.request.urlopen(urllib.request.Request("{url}/v2/models/mlp-a/infer", body)))
    print(list(answer.outputs[0].as_numpy().ravel()) == told["outputs"][0]["data"])
asyncio.run(main())
"""
        done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, timeout=WITHIN_S)
    finally:
        code = node.end()
    assert done.stdout == "True\n", done.stderr
    assert (code, node.left_behind()) == (0, [])


def test_an_isolated_demo_tells_the_batches_of_all_processes_apart(tmp_path: Path) -> None:
    node = Node(tmp_path, TWO, "--isolate", "--idle-seconds", "0.3", "--demo", "3")
    report = node.line()
    code = node.end()

    assert (code, node.left_behind()) == (0, []), node.log.read_text()
    assert report["passed"]


def test_a_demo_on_a_device_too_small_for_all_answers_everything_right(tmp_path: Path) -> None:
    functions = "".join(document(f"mlp-{number}", f"mlp?features=4&seed={number}", quota_percent="20") for number in range(4))
    node = Node(tmp_path, functions, "--device-memory", "8Mi", "--demo", "4", "--seed", "7")
    report = node.line()
    code = node.end()

    assert (code, node.left_behind()) == (0, []), node.log.read_text()
    assert report["passed"]
    assert len(report["functions"]) == 4
    assert all(line["right"] > 4 and line["wrong"] == line["unchecked"] == line["failed"] == 0 for line in report["functions"])
    assert sum(line["swaps"] for line in report["functions"]) > 0


def test_the_supervisor_itself_keeps_nothing_open(tmp_path: Path) -> None:
    import asyncio

    from sluice.documents import read_functions
    from sluice.plan import Plan
    from sluice.rundir import RunDir
    from sluice.supervisor import Supervisor

    path = tmp_path / "f.yaml"
    path.write_text(TWO)
    run_dir = tmp_path / "run"
    plan = Plan(
        tuple(read_functions([path])), run_dir, ("cpu:0", "cpu:1"), 32 << 20, 256 << 20, None, 1, "127.0.0.1", free_port("127.0.0.1"), False, 60.0
    )

    async def once() -> None:
        supervisor = Supervisor(plan, RunDir(run_dir, store_folder(run_dir)), lambda _: None, lambda *_: None)
        try:
            outcome = await supervisor.start(lambda _: None)
            assert len(outcome.serving) == 2
        finally:
            await supervisor.stop()

    gc.collect()
    before, children = set(os.listdir("/proc/self/fd")), set(psutil.Process().children(recursive=True))
    asyncio.run(once())

    assert set(os.listdir("/proc/self/fd")) <= before
    assert set(psutil.Process().children(recursive=True)) <= children
    assert not run_dir.exists()
    assert not store_folder(run_dir).exists()
