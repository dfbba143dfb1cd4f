"""How a whole node begins and ends: what cannot serve, signals, kill -9, scale to zero, and what is left afterwards. Everything is real."""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from nodeagent.shell.hoststore import store_folder
from sluice.ports import free_port
from tests.sluice.node import TWO, WITHIN_S, Node, document, infer, serves, until

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
