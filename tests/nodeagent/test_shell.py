"""The shell of the agent over real sockets and processes: what a predictor and the supervisor may ask for, and what they get."""

from __future__ import annotations

import urllib.request
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from contracts.channel import Channel, connect
from contracts.errors import ExecutionError, InvalidArtifact, NotFound, NotPermitted, Refused, SluiceError, Unavailable
from contracts.functions import Share
from contracts.wire import Answer, Failed, FromControl, FunctionChanged, FunctionGone, Reply, Watch, Welcome
from tests.nodeagent.node import Control, Node, Predictor, best_effort, eventually, function

ROWS = np.arange(8, dtype="<f4").reshape(2, 4)


def test_a_batch_of_two_requests_runs_on_the_memory_of_both(control: Control, predictor: Predictor) -> None:
    control.declare(function("a", "add?value=3"))
    first, second = predictor.call("default/a", ROWS, ROWS[:1])
    np.testing.assert_array_equal(first, ROWS + 3)
    np.testing.assert_array_equal(second, ROWS[:1] + 3)


def test_functions_that_do_not_fit_together_take_turns_in_memory(start: Callable[..., Node]) -> None:
    node = start(memory="64Ki", host="1Mi").ready()
    control = Control(node.run_dir)
    control.grant()
    control.declare(*(function(f"f{i}", f"add?value={i}&bytes=40000") for i in range(4)))
    predictor = Predictor(node.run_dir)
    for turn in range(3):
        for i in range(4):
            np.testing.assert_array_equal(predictor.call(f"default/f{i}", ROWS)[0], ROWS + i, err_msg=f"turn {turn}")
    # A lane tells of the last bytes on another channel than of the end of the run that they were for.
    device = eventually(lambda: next((each for each in control.status().devices if each.swaps >= 12), None), "the last copy's end")
    assert device is not None
    assert (device.swaps, device.used_bytes <= 65536) == (12, True)


def test_the_first_answer_is_cold_and_the_next_is_not(control: Control, predictor: Predictor) -> None:
    control.declare(function("a", "add?value=1"))
    first = predictor.outcome(predictor.submit("default/a", ROWS))
    eventually(lambda: control.function("default/a").resident_on, "the end of the copy")
    second = predictor.outcome(predictor.submit("default/a", ROWS))
    assert [answer.cold for answer in (first, second) if isinstance(answer, Answer)] == [True, False]


def test_status_counts_what_was_answered(control: Control, predictor: Predictor) -> None:
    control.declare(function("a", "add?value=1"), function("b", "add?fault=error"))
    for _ in range(3):
        predictor.call("default/a", ROWS, ROWS)
    with pytest.raises(ExecutionError):
        predictor.call("default/b", ROWS)
    eventually(lambda: control.function("default/a").resident_on, "the end of the copy")
    status = control.function("default/a")
    assert (status.state, status.answered, status.failed, status.swaps, status.resident_on) == ("ready", 6, 0, 1, ("cpu:0",))
    assert status.slo_met == 6
    assert status.gpu_ns > 0
    assert status.latency.p50_ms > 0
    assert control.function("default/b").failed == 1


def test_a_failing_model_is_an_error_of_its_own_request_only(control: Control, predictor: Predictor) -> None:
    control.declare(function("bad", "add?fault=error"), function("good", "add?value=1"))
    with pytest.raises(ExecutionError, match="the model failed"):
        predictor.call("default/bad", ROWS)
    np.testing.assert_array_equal(predictor.call("default/good", ROWS)[0], ROWS + 1)


def test_a_model_that_lanes_cannot_build_becomes_failed(control: Control, predictor: Predictor) -> None:
    control.declare(function("odd", "add?fault=attach"))
    predictor.outcome(predictor.submit("default/odd", ROWS))
    assert eventually(lambda: control.function("default/odd").state == "failed", "the failure")
    with pytest.raises(Unavailable, match="cannot be built"):
        predictor.call("default/odd", ROWS)


LOADS: dict[str, tuple[str, type[SluiceError], str]] = {
    "a file that is no model": ("broken", InvalidArtifact, "is no model"),
    "a model that kills the loader": ("die", Unavailable, "the loader died"),
    "a model larger than the budget": ("big?bytes=9000000", Unavailable, "budget"),
    "a model larger than the device": ("big?bytes=2000000", Refused, "weights"),
}


@pytest.mark.parametrize(("source", "kind", "words"), LOADS.values(), ids=LOADS)
def test_a_model_that_cannot_be_served_fails_alone(
    source: str, kind: type[SluiceError], words: str, node: Node, control: Control, predictor: Predictor
) -> None:
    with pytest.raises(kind, match=words):
        control.declare(function("bad", source))
    assert control.function("default/bad").state == "failed"
    with pytest.raises(Unavailable, match="default/bad is failed"):
        predictor.call("default/bad", ROWS)
    control.declare(function("good", "add?value=1"))
    np.testing.assert_array_equal(predictor.call("default/good", ROWS)[0], ROWS + 1)
    control.remove("default/bad")
    assert len(list(node.store.glob("*.weights"))) == 1


def test_a_removed_function_leaves_no_weights_and_its_room_is_free_again(node: Node, control: Control, predictor: Predictor) -> None:
    control.declare(function("a", "big?bytes=900000"))
    predictor.call("default/a", ROWS)
    control.remove("default/a")
    with pytest.raises(NotFound):
        predictor.call("default/a", ROWS)
    eventually(lambda: not list(node.store.iterdir()), "the removal of the files")
    status = control.status()
    assert (status.host_used_bytes, status.functions) == (0, ())
    control.declare(function("a", "big?bytes=900000&value=5"))
    np.testing.assert_array_equal(predictor.call("default/a", ROWS)[0], ROWS + 5)


def test_functions_of_one_model_share_its_weights(node: Node, control: Control, predictor: Predictor) -> None:
    control.declare(function("a", "add?value=7"), function("b", "add?value=7"))
    assert len(list(node.store.glob("*.weights"))) == 1
    control.remove("default/a")
    np.testing.assert_array_equal(predictor.call("default/b", ROWS)[0], ROWS + 7)


def test_a_function_declared_again_is_replaced(control: Control, predictor: Predictor) -> None:
    control.declare(function("a", "add?value=1"))
    predictor.call("default/a", ROWS)
    control.declare(function("a", "add?value=2"))
    np.testing.assert_array_equal(predictor.call("default/a", ROWS)[0], ROWS + 2)
    assert len(control.status().functions) == 1


def test_a_share_changes_while_requests_run(folder: Path, control: Control, predictor: Predictor) -> None:
    control.declare(function("a", f"add?value=1&gate={folder}/gate"))
    running, queued = predictor.submit("default/a", ROWS), predictor.submit("default/a", ROWS)
    control.share("default/a", Share(20, 2000))
    (folder / "gate").touch()
    assert isinstance(predictor.outcome(running), Answer)
    assert isinstance(predictor.outcome(queued), Answer)
    assert predictor.call("default/a", ROWS)
    status = control.status()
    assert status.functions[0].share == Share(20, 2000)
    assert 20 in {lane.sm_percent for lane in status.devices[0].lanes}


def test_an_acknowledged_share_is_known_to_those_who_watch_whatever_becomes_of_the_agent(node: Node, control: Control) -> None:
    control.declare(function("a", "add"))
    watcher = Channel(connect(str(node.run_dir / "control.sock")), FromControl)
    watcher.send(Watch(7))
    assert watcher.receive() == (Reply(7), [])
    control.share("default/a", Share(20, 2000))
    node.kill()
    told, _ = watcher.receive() or (None, [])
    assert isinstance(told, FunctionChanged)
    assert (told.info.function.key, told.info.function.share) == ("default/a", Share(20, 2000))
    watcher.close()


def test_shares_that_cannot_be_guaranteed_are_refused(control: Control) -> None:
    control.declare(function("a", "add", share=Share(100, 6000)))
    with pytest.raises(Refused, match="default/b"):
        control.declare(function("b", "add", share=Share(100, 5000)))
    control.declare(function("b", "add", share=Share(100, 4000)))
    with pytest.raises(Refused):
        control.share("default/b", Share(100, 4001))
    with pytest.raises(NotFound):
        control.share("default/c", Share(1, 1))


def test_a_removed_function_answers_what_runs_and_refuses_what_waits(folder: Path, control: Control, predictor: Predictor) -> None:
    control.declare(function("a", f"add?value=1&gate={folder}/gate", share=Share(100, 1000)))
    running, waiting = predictor.submit("default/a", ROWS), predictor.submit("default/a", ROWS)
    eventually(lambda: control.status().devices[0].running_sm, "the first batch")
    control.remove("default/a")
    refused = predictor.outcome(waiting)
    assert isinstance(refused, Failed)
    assert refused.kind == "NotFound"
    (folder / "gate").touch()
    assert isinstance(predictor.outcome(running), Answer)
    np.testing.assert_array_equal(predictor.result(running)[0], ROWS + 1)
    eventually(lambda: control.status().devices[0].used_bytes == 0, "the eviction")
    assert any(isinstance(notice, FunctionGone) for notice in predictor.notices)


def test_best_effort_work_pauses_for_a_latency_sensitive_request(folder: Path, control: Control, predictor: Predictor) -> None:
    slow = best_effort("slow", f"add?value=1&gate={folder}/gate")
    control.declare(slow, function("fast", "add?value=2", share=Share(100, 1000)))
    batch = predictor.submit("default/slow", ROWS)
    eventually(lambda: control.status().devices[0].running_sm, "the best-effort batch")
    np.testing.assert_array_equal(predictor.call("default/fast", ROWS)[0], ROWS + 2)
    assert batch.id not in predictor.outcomes
    (folder / "gate").touch()
    assert isinstance(predictor.outcome(batch), Answer)
    np.testing.assert_array_equal(predictor.result(batch)[0], ROWS + 1)


def test_a_cancelled_batch_is_answered_once(folder: Path, control: Control, predictor: Predictor) -> None:
    from contracts.wire import Cancel

    control.declare(function("a", f"add?gate={folder}/gate", share=Share(100, 1000)))
    running, waiting = predictor.submit("default/a", ROWS), predictor.submit("default/a", ROWS)
    for batch in (waiting, waiting, running):
        predictor.channel.send(Cancel(batch.id))
    assert isinstance(predictor.outcome(waiting), Failed)
    (folder / "gate").touch()
    predictor.outcome(running)
    assert isinstance(predictor.outcome(predictor.submit("default/a", ROWS)), Answer)


def test_only_granted_functions_may_be_used(node: Node) -> None:
    control = Control(node.run_dir)
    control.declare(function("a", "add?value=1"), function("b", "add?value=2"))
    predictor = Predictor(node.run_dir)
    with pytest.raises(NotPermitted):
        predictor.call("default/a", ROWS)
    assert predictor.notices == [Welcome(())]
    control.grant("default/a", "default/later")
    assert predictor.receive()
    assert [notice.info.function.key for notice in predictor.notices if isinstance(notice, FunctionChanged)] == ["default/a"]
    np.testing.assert_array_equal(predictor.call("default/a", ROWS)[0], ROWS + 1)
    with pytest.raises(NotPermitted):
        predictor.call("default/b", ROWS)
    with pytest.raises(NotFound):
        predictor.call("default/later", ROWS)
    control.grant("default/b")
    with pytest.raises(NotPermitted):
        predictor.call("default/a", ROWS)
    assert FunctionGone("default/a") in predictor.notices
    with pytest.raises(NotFound, match="no process"):
        control.grant(pid=2**22 + 1)


def test_a_new_function_is_announced_as_loading_then_ready(control: Control, predictor: Predictor) -> None:
    control.declare(function("a", "add?value=1"))
    predictor.call("default/a", ROWS)
    states = [notice.info.state for notice in predictor.notices if isinstance(notice, FunctionChanged)]
    assert states == ["loading", "ready"]


def test_metrics_are_served(start: Callable[..., Node]) -> None:
    node = start("--metrics-port", "0").ready()
    control = Control(node.run_dir)
    control.declare(function("a", "add?value=1", share=Share(40, 550)))
    url = next(line.split()[-1] for line in node.read_log().splitlines() if "metrics on" in line)
    page = urllib.request.urlopen(url, timeout=60).read().decode()
    assert 'sluice_share_quota_percent{function="default/a"} 5.5' in page
    assert 'sluice_gpu_seconds_total{function="default/a"} 0.0' in page
    assert 'sluice_device_memory_bytes{device="cpu:0"} 0.0' in page
