"""Deaths: of a lane, the fork server, the loader, a predictor, the agent. Each accepted request is answered once, nothing leaks, it serves again."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest

from contracts.errors import DeadlineExceeded, Unavailable
from contracts.functions import Share
from contracts.units import S
from contracts.wire import Answer, Failed
from tests.faults.census import alive, command, descriptors
from tests.nodeagent.fake_worker import LYING_SM
from tests.nodeagent.node import REPOSITORY, Control, Node, Predictor, eventually, function

ROWS = np.arange(8, dtype="<f4").reshape(2, 4)


def _lanes(control: Control) -> list[int]:
    return [lane.pid for device in control.status().devices for lane in device.lanes if lane.pid]


def _maps(pid: int) -> str:
    return Path(f"/proc/{pid}/maps").read_text()


def _descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def test_a_batch_whose_lane_dies_once_is_run_again(folder: Path, control: Control, predictor: Predictor) -> None:
    control.declare(function("a", f"add?value=1&fault=once&mark={folder}/mark"))
    np.testing.assert_array_equal(predictor.call("default/a", ROWS)[0], ROWS + 1)
    assert control.function("default/a").retried == 1


@pytest.mark.parametrize("fault", ["crash", "lie"])
def test_a_batch_that_kills_every_lane_fails_and_others_are_served(fault: str, control: Control, predictor: Predictor) -> None:
    control.declare(function("bad", f"add?fault={fault}"), function("good", "add?value=1"))
    with pytest.raises(Unavailable, match="lane was lost"):
        predictor.call("default/bad", ROWS)
    np.testing.assert_array_equal(predictor.call("default/good", ROWS)[0], ROWS + 1)


def test_kill_9_of_a_lane_under_load_answers_everything_once(node: Node, control: Control, predictor: Predictor) -> None:
    control.declare(function("a", "add?value=1", share=Share(100, 1000)))
    predictor.call("default/a", ROWS)
    before = _descriptors(node.process.pid)
    for _ in range(3):
        batches = [predictor.submit("default/a", ROWS) for _ in range(50)]
        victims = eventually(lambda: _lanes(control), "a lane")
        os.kill(victims[0], signal.SIGKILL)
        outcomes = [predictor.outcome(batch) for batch in batches]
        assert all(isinstance(outcome, Answer) or outcome.kind == "Unavailable" for outcome in outcomes)
        assert sum(isinstance(outcome, Answer) for outcome in outcomes) >= 49
    np.testing.assert_array_equal(predictor.call("default/a", ROWS)[0], ROWS + 1)
    eventually(lambda: _descriptors(node.process.pid) <= before, "the closing of the lanes' descriptors")


@pytest.mark.parametrize("way", ["a batch that does not end", "a lane that stands still"])
def test_a_lane_that_hangs_is_killed_and_replaced_and_its_batch_is_answered(way: str, start: Callable[..., Node]) -> None:
    node = start("--hang-seconds", "1").ready()
    control = Control(node.run_dir)
    control.grant()
    stands_still = way == "a lane that stands still"
    control.declare(function("bad", "add?value=1" if stands_still else "add?fault=hang", share=Share(100, 1000)))
    control.declare(function("good", "add?value=2", share=Share(100, 1000)))
    predictor = Predictor(node.run_dir)
    predictor.call("default/good", ROWS)
    (lane,) = _lanes(control)
    if stands_still:
        os.kill(lane, signal.SIGSTOP)
    batch = predictor.submit("default/bad", ROWS, timeout_ns=60 * S if stands_still else 3 * S)
    outcome = predictor.outcome(batch)
    if stands_still:
        assert isinstance(outcome, Answer), "its copy was seen to stand still long before its deadline"
    else:
        assert isinstance(outcome, Failed)
        assert outcome.kind == Unavailable.__name__, outcome
    np.testing.assert_array_equal(predictor.call("default/good", ROWS)[0], ROWS + 2)
    assert lane not in _lanes(control)
    eventually(lambda: not psutil.pid_exists(lane), "the end of its process")


def test_a_lane_that_stops_to_copy_for_a_batch_that_still_waits_is_killed_and_the_copy_made_anew(start: Callable[..., Node]) -> None:
    node = start("--hang-seconds", "1", "--link-bandwidth", "50M", memory="24Mi", host="64Mi").ready()
    control = Control(node.run_dir)
    control.grant()
    control.declare(function("a", "big?value=1&bytes=16000000"), function("b", "big?value=2&bytes=16000000"))
    predictor = Predictor(node.run_dir)
    predictor.call("default/a", ROWS)
    predictor.call("default/b", ROWS)
    (lane,) = _lanes(control)
    os.kill(lane, signal.SIGSTOP)
    batch = predictor.submit("default/a", ROWS, timeout_ns=60 * S)
    eventually(lambda: not psutil.pid_exists(lane), "the end of its process")
    assert isinstance(predictor.outcome(batch), Answer)
    np.testing.assert_array_equal(predictor.result(batch)[0], ROWS + 1)
    assert control.function("default/a").retried == 0, "its batch was on no lane"


def test_a_lane_that_cannot_prove_its_cap_does_not_serve(control: Control, predictor: Predictor) -> None:
    control.declare(function("liar", "add?value=1", share=Share(LYING_SM, 100)), function("good", "add?value=2"))
    batch = predictor.submit("default/liar", ROWS, timeout_ns=3 * S)
    np.testing.assert_array_equal(predictor.call("default/good", ROWS)[0], ROWS + 2)
    outcome = predictor.outcome(batch)
    assert isinstance(outcome, Failed)
    assert outcome.kind == DeadlineExceeded.__name__


def test_lanes_outlive_the_fork_server_and_the_next_one_forks_more(node: Node, control: Control, predictor: Predictor) -> None:
    control.declare(function("a", "add?value=1"))
    predictor.call("default/a", ROWS)
    lane = _lanes(control)[0]
    server = next(child for child in psutil.Process(node.process.pid).children() if "tests.nodeagent.fake_worker" in command(child))
    server.kill()
    server.wait()
    np.testing.assert_array_equal(predictor.call("default/a", ROWS)[0], ROWS + 1)
    assert _lanes(control) == [lane]
    control.declare(function("b", "add?value=2", share=Share(30, 1000)))
    np.testing.assert_array_equal(predictor.call("default/b", ROWS)[0], ROWS + 2)


def test_a_predictor_that_is_killed_leaves_nothing(folder: Path, node: Node, control: Control, predictor: Predictor) -> None:
    control.declare(function("a", f"add?value=1&gate={folder}/gate"), function("b", "add?value=2"))
    predictor.call("default/b", ROWS)
    before = _descriptors(node.process.pid)
    code = "import sys; from pathlib import Path; import numpy as np; from tests.nodeagent.node import Predictor; p = Predictor(Path(sys.argv[1]))\n"
    code += "for _ in range(20): p.submit('default/a', np.ones((1, 4)))\nprint('sent', flush=True); p.closed()"
    granted = "import sys; sys.stdin.readline(); "
    child = subprocess.Popen(
        [sys.executable, "-c", granted + code, str(node.run_dir)], cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdin is not None and child.stdout is not None
    control.grant(pid=child.pid)
    child.stdin.write("go\n")
    child.stdin.flush()
    assert child.stdout.readline() == "sent\n"
    eventually(lambda: control.function("default/a").queued == 18 or control.status().devices[0].running_sm, "its requests")
    lanes = _lanes(control)
    assert any("test-segment" in _maps(lane) for lane in lanes)
    child.kill()
    child.wait()
    child.stdin.close()
    child.stdout.close()
    eventually(lambda: control.function("default/a").queued == 0, "the cancelling of what waited")
    (folder / "gate").touch()
    eventually(lambda: control.status().devices[0].running_sm == 0, "the end of what ran")
    eventually(lambda: all(_maps(lane).count("test-segment") <= 1 for lane in lanes), "the unmapping of its segment")
    np.testing.assert_array_equal(predictor.call("default/b", ROWS)[0], ROWS + 2)
    eventually(lambda: _descriptors(node.process.pid) <= before + 2 * len(_lanes(control)), "the closing of its descriptors")


def test_sigterm_answers_what_runs_refuses_what_is_new_and_leaves_the_store(folder: Path, node: Node, control: Control, predictor: Predictor) -> None:
    control.declare(function("a", f"add?value=1&gate={folder}/gate"), function("b", "add?value=2"))
    batch = predictor.submit("default/a", ROWS)
    eventually(lambda: control.status().devices[0].running_sm, "the batch")
    children = node.children()
    node.process.send_signal(signal.SIGTERM)
    with pytest.raises(Unavailable, match="stopping"):
        eventually(lambda: predictor.call("default/b", ROWS[:1]) and False, "the refusal")
    (folder / "gate").touch()
    assert isinstance(predictor.outcome(batch), Answer)
    assert predictor.closed()
    assert node.process.wait(60) == 0
    assert not any(map(alive, children))
    assert [path.name for path in node.run_dir.iterdir()] == ["agent.lock"]
    assert len(list(node.store.glob("*.weights"))) == 2


def test_sigterm_gives_up_on_what_does_not_end(folder: Path, start: Callable[..., Node]) -> None:
    node = start("--drain-seconds", "1", "--remove-store").ready()
    control = Control(node.run_dir)
    control.grant()
    control.declare(function("a", f"add?gate={folder}/never"))
    predictor = Predictor(node.run_dir)
    batch = predictor.submit("default/a", ROWS)
    eventually(lambda: control.status().devices[0].running_sm, "the batch")
    node.process.send_signal(signal.SIGTERM)
    outcome = predictor.outcome(batch)
    assert isinstance(outcome, Failed)
    assert outcome.kind == "Unavailable"
    assert node.process.wait(60) == 0
    assert not node.store.exists()


def test_kill_9_of_the_agent_leaves_only_the_store_and_the_next_adopts_it(start: Callable[..., Node]) -> None:
    first = start().ready()
    control = Control(first.run_dir)
    functions = [function("a", "add?value=1"), function("b", "add?value=2")]
    control.grant()
    control.declare(*functions)
    predictor = Predictor(first.run_dir)
    predictor.call("default/a", ROWS)
    children = first.children()
    assert len(children) >= 3
    files = {path.name: path.stat().st_ino for path in first.store.iterdir()}
    first.kill()
    assert predictor.closed()
    eventually(lambda: not any(map(alive, children)), "the end of its processes")

    second = start().ready()
    control = Control(second.run_dir)
    control.grant()
    control.declare(*functions)
    predictor = Predictor(second.run_dir)
    np.testing.assert_array_equal(predictor.call("default/b", ROWS)[0], ROWS + 2)
    assert {path.name: path.stat().st_ino for path in second.store.iterdir()} == files
    assert not any("tests.nodeagent.fake_loader" in command(child) for child in second.children())


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a changed byte": lambda path: _overwrite(path, b"\xff"),
    "a missing end": lambda path: os.truncate(path, 100),
    "an empty file": lambda path: os.truncate(path, 0),
    "a lost index": lambda path: path.with_suffix(".json").unlink(),
    "a torn index": lambda path: os.truncate(path.with_suffix(".json"), 50),
    "an index of noise": lambda path: path.with_suffix(".json").write_bytes(b"\0" * 300),
    "a lost file": lambda path: path.unlink(),
}


def _overwrite(path: Path, data: bytes) -> None:
    with path.open("r+b") as file:
        file.write(data)


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_weights_are_not_adopted_but_read_again(damage: Callable[[Path], object], start: Callable[..., Node]) -> None:
    first = start().ready()
    Control(first.run_dir).declare(function("a", "add?value=1"))
    weights = next(first.store.glob("*.weights"))
    first.kill()
    damage(weights)
    (first.store / ".tmp-left").write_bytes(b"x" * 1000)

    second = start().ready()
    assert not (second.store / ".tmp-left").exists()
    control = Control(second.run_dir)
    control.grant()
    control.declare(function("a", "add?value=1"))
    predictor = Predictor(second.run_dir)
    np.testing.assert_array_equal(predictor.call("default/a", ROWS)[0], ROWS + 1)
    assert len(list(second.store.iterdir())) == 3


def test_weights_that_are_damaged_while_served_are_read_again(node: Node, control: Control, predictor: Predictor) -> None:
    control.declare(function("a", "add?value=1"), function("b", "add?value=2"))
    for path in node.store.glob("*.weights"):
        os.truncate(path, 10)

    def served() -> bool:
        outcome = predictor.outcome(predictor.submit("default/a", ROWS))
        return isinstance(outcome, Answer)

    eventually(served, "the repair")
    np.testing.assert_array_equal(predictor.call("default/a", ROWS)[0], ROWS + 1)


def test_weights_that_nobody_claims_after_a_restart_give_way(start: Callable[..., Node]) -> None:
    first = start(host="1Mi").ready()
    Control(first.run_dir).declare(function("a", "big?bytes=700000"))
    first.kill()
    second = start(host="1Mi").ready()
    control = Control(second.run_dir)
    assert control.status().host_used_bytes > 700000
    control.declare(function("b", "big?bytes=800000"))
    assert len(list(second.store.glob("*.weights"))) == 1


def test_a_second_agent_on_the_same_run_dir_is_refused(node: Node, start: Callable[..., Node]) -> None:
    second = start()
    assert second.process.wait(60) == 1
    assert f"served by another agent (pid {node.process.pid})" in second.read_log()
    assert Control(node.run_dir).status().pid == node.process.pid


def test_a_lock_that_a_killed_agent_left_to_its_child_is_waited_for(folder: Path, start: Callable[..., Node]) -> None:
    (folder / "run").mkdir(mode=0o700)
    dead = subprocess.Popen(["true"])
    dead.wait()
    with (folder / "run" / "agent.lock").open("w") as held:
        held.write(f"{dead.pid}\n")
        held.flush()
        fcntl.flock(held, fcntl.LOCK_EX)
        node = start()
        eventually(lambda: descriptors(node.process.pid)[".lock"] or node.process.poll() is not None, "its look at the lock")
    node.ready()


def test_sockets_of_a_killed_agent_are_taken_over(start: Callable[..., Node]) -> None:
    start().ready().kill()
    assert Control(start().ready().run_dir).status().functions == ()


def test_a_device_that_does_not_fit_into_memory_is_a_clear_error(start: Callable[..., Node]) -> None:
    node = start(memory="900T")
    assert node.process.wait(60) == 1
    assert "use a smaller --device-memory" in node.read_log()
