"""Agents on fake GPUs: real processes are killed, and everything comes back; each request is answered once; limits that fail, fail closed."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from contracts.errors import Refused
from contracts.functions import Share
from contracts.units import S
from contracts.wire import Answer, Failed
from tests.fakes import gpu
from tests.faults.census import alive
from tests.nodeagent.fake_worker import FAST_SM, LYING_SM, STILLBORN_SM
from tests.nodeagent.gpus import ROWS, Gpus
from tests.nodeagent.node import Node, eventually, function

WHOLE = Share(100, 1000)
HALF = Share(50, 1000)


def test_functions_run_in_lanes_that_the_driver_holds_to_their_size(gpus: Callable[..., Gpus]) -> None:
    agent = gpus()
    agent.control.declare(function("a", "add?value=1", share=WHOLE), function("b", "add?value=2", share=HALF))
    assert agent.answers("default/a", 1) and agent.answers("default/b", 2)
    (device,) = agent.control.status().devices
    assert (device.backend, device.state) == ("mps", "up")
    (server,) = agent.find("mps_control.py", "--server")
    assert {lane.sm_percent for lane in device.lanes} == {50, 100}
    environment = psutil.Process(server.pid).environ()
    assert environment["CUDA_VISIBLE_DEVICES"] == "GPU-00000000-0000-0000-0000-000000000000"


DEATHS: dict[str, Callable[[Gpus], None]] = {
    "kill -9 of the slab holder": lambda agent: agent.find("tests.fakes.holder")[0].kill(),
    "kill -9 of the MPS server": lambda agent: agent.find("mps_control.py", "--server")[0].kill(),
    "kill -9 of the MPS daemon": lambda agent: agent.find("mps_control.py", "-f")[-1].kill(),
    "kill -9 of what ties the daemon to the agent": lambda agent: agent.find("nodeagent.shell.tether")[0].kill(),
    "a client's fatal fault, which takes all clients": lambda agent: agent.find("mps_control.py", "--server")[0].send_signal(signal.SIGUSR1),
}


@pytest.mark.parametrize("death", DEATHS.values(), ids=DEATHS)
def test_a_device_that_dies_under_load_comes_back_and_answers_everything_once(death: Callable[[Gpus], None], gpus: Callable[..., Gpus]) -> None:
    agent = gpus()
    agent.control.declare(function("a", "add?value=1", share=WHOLE), function("b", "add?value=2", share=HALF))
    assert agent.answers("default/a", 1) and agent.answers("default/b", 2)
    old = agent.find("tests.fakes.holder") + agent.find("mps_control.py") + [psutil.Process(pid) for pid in agent.lanes()]
    swaps = agent.control.function("default/a").swaps
    batches = [agent.predictor.submit(key, ROWS) for _ in range(50) for key in ("default/a", "default/b")]
    death(agent)
    outcomes = [agent.predictor.outcome(batch) for batch in batches]
    assert all(isinstance(outcome, Answer) or outcome.kind == "Unavailable" for outcome in outcomes)
    assert sum(isinstance(outcome, Answer) for outcome in outcomes) >= len(batches) - 4, "what ran is tried once more, what waited runs"
    eventually(lambda: not any(map(alive, old)), "the end of all that used the lost memory")
    eventually(agent.back, "the device's return")
    assert agent.answers("default/a", 1) and agent.answers("default/b", 2)
    assert agent.control.function("default/a").swaps > swaps, "its weights are swapped in again"
    assert agent.node.process.poll() is None
    assert len(agent.find("mps_control.py", "--server")) == 1


def test_a_device_that_cannot_be_brought_back_is_tried_again_and_others_serve_meanwhile(
    gpus: Callable[..., Gpus], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_HOLDER", str(folder / "broken"))
    agent = gpus("--device", "cuda:0", "--device", "cuda:1")
    agent.control.declare(function("a", "add?value=1", share=WHOLE))
    assert agent.answers("default/a", 1)
    (folder / "broken").touch()
    agent.find("tests.fakes.holder")[0].kill()
    eventually(lambda: "cannot be brought back yet" in agent.node.read_log(), "a vain try")
    states = [device.state for device in agent.control.status().devices]
    assert sorted(states) == ["lost", "up"]
    assert agent.answers("default/a", 1)
    (folder / "broken").unlink()
    eventually(agent.back, "the device's return")
    assert agent.answers("default/a", 1)


def test_kill_9_of_a_lane_costs_that_lane_alone(gpus: Callable[..., Gpus]) -> None:
    agent = gpus()
    agent.control.declare(function("a", "add?value=1", share=WHOLE))
    assert agent.answers("default/a", 1)
    holder, server = agent.find("tests.fakes.holder"), agent.find("mps_control.py", "--server")
    os.kill(agent.lanes()[0], signal.SIGKILL)
    assert agent.answers("default/a", 1)
    assert (agent.find("tests.fakes.holder"), agent.find("mps_control.py", "--server")) == (holder, server)
    assert "is lost (" not in agent.node.read_log()


def test_a_lane_that_hangs_is_terminated_at_the_server_before_it_is_killed(gpus: Callable[..., Gpus]) -> None:
    agent = gpus("--hang-seconds", "1")
    agent.control.declare(function("bad", "add?fault=hang", share=WHOLE), function("good", "add?value=2", share=WHOLE))
    assert agent.answers("default/good", 2)
    (lane,) = agent.lanes()
    outcome = agent.predictor.outcome(agent.predictor.submit("default/bad", ROWS, timeout_ns=3 * S))
    assert isinstance(outcome, Failed)
    assert agent.answers("default/good", 2)
    (pipe,) = agent.node.run_dir.glob("mps-*")
    assert f"terminate_client {agent.find('mps_control.py', '--server')[0].pid} {lane}" in (pipe / "control.log").read_text()
    assert "is lost (" not in agent.node.read_log()


UNPROVEN = {
    LYING_SM: "it reads back 132 SMs, not 15 to 18",
    FAST_SM: "but computes at 100.0 % of the whole GPU",
    STILLBORN_SM: "it ended as it started",
}


def test_functions_whose_lanes_cannot_prove_their_cap_are_given_up_and_say_why(gpus: Callable[..., Gpus]) -> None:
    agent = gpus()
    agent.control.declare(function("good", "add?value=2", share=HALF))
    agent.control.declare(*(function(f"bad-{sm}", "add?value=1", share=Share(sm, 100)) for sm in UNPROVEN))
    batches = [agent.predictor.submit(f"default/bad-{sm}", ROWS) for sm in UNPROVEN]
    for sm, reason in UNPROVEN.items():
        eventually(lambda sm=sm: agent.control.function(f"default/bad-{sm}").state == "failed", f"the giving up of {sm} %")
        assert reason in agent.control.function(f"default/bad-{sm}").reason
    assert all(isinstance(agent.predictor.outcome(batch), Failed) for batch in batches)
    assert agent.answers("default/good", 2)
    assert agent.state() == "up"


def test_without_means_to_hold_lanes_only_functions_of_the_whole_gpu_are_served(gpus: Callable[..., Gpus], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_MPS", "absent")
    monkeypatch.setenv("FAKE_DRIVER", "12000")
    agent = gpus()
    (device,) = agent.control.status().devices
    assert device.backend == "quota" and "no-such-mps-control is not there" in device.why
    with pytest.raises(Refused, match=r"nothing here can hold it to 50 % of the SMs .* only sm-percent 100 is served"):
        agent.control.declare(function("half", "add?value=1", share=HALF))
    agent.control.declare(function("whole", "add?value=2", share=WHOLE))
    assert agent.answers("default/whole", 2)
    with pytest.raises(Refused, match="nothing here can hold it"):
        agent.control.share("default/whole", HALF)


def test_without_mps_green_contexts_hold_lanes_that_take_turns(gpus: Callable[..., Gpus], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_MPS", "absent")
    agent = gpus()
    agent.control.declare(function("a", "add?value=1", share=WHOLE), function("b", "add?value=2", share=HALF))
    assert agent.answers("default/a", 1) and agent.answers("default/b", 2)
    assert agent.control.status().devices[0].backend == "green"
    with pytest.raises(Refused, match=r"less than the 8 that green can hold a lane to: give it 7 %"):
        agent.control.declare(function("tiny", "add?value=3", share=Share(5, 100)))


VAIN_STARTS = {
    "limits that are required and cannot be had": (
        ("--require-limits",),
        {"FAKE_MPS": "absent", "FAKE_DRIVER": "12000"},
        "--require-limits was given",
    ),
    "MPS that is asked for and is not there": (("--sm-backend", "mps"), {"FAKE_MPS": "absent"}, "MPS was asked for and cannot be had"),
    "MPS that is asked for and does not start": (("--sm-backend", "mps"), {"FAKE_MPS": "broken"}, "the fake is broken"),
    "one GPU by two names": (("--device", "cuda:1", "--device", f"cuda:{gpu.uuid(1)}"), {}, "another --device names already"),
    "a GPU that is not there": (("--device", "cuda:7"), {}, "there is no such GPU; 2 are visible"),
}


@pytest.mark.parametrize(("arguments", "environment", "reason"), VAIN_STARTS.values(), ids=VAIN_STARTS)
def test_what_cannot_be_had_as_it_was_asked_for_is_a_clear_error(
    arguments: tuple[str, ...], environment: dict[str, str], reason: str, start: Callable[..., Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    arguments = arguments if "--device" in arguments else ("--device", "cuda:0", *arguments)
    node = start(*arguments, module="tests.fakes.gpu_agent")
    assert node.process.wait(120) == 1
    assert reason in node.read_log()
    assert not list(node.run_dir.glob("mps-*"))


def test_mps_that_does_not_start_is_said_and_done_without(gpus: Callable[..., Gpus], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_MPS", "broken")
    agent = gpus()
    assert agent.control.status().devices[0].backend == "green"
    assert "the fake is broken" in agent.node.read_log()


def test_a_gpu_may_be_named_by_its_uuid_and_gives_what_lanes_do_not_need(gpus: Callable[..., Gpus]) -> None:
    agent = gpus("--device", "cuda:GPU-00000000-0000-0000-0000-000000000001", memory="0")
    (device,) = agent.control.status().devices
    assert device.capacity_bytes == 32 << 20
    agent.control.declare(function("a", "add?value=1", share=HALF))
    assert agent.answers("default/a", 1)


def test_kill_9_of_the_agent_leaves_no_process_and_its_successor_cleans_up(gpus: Callable[..., Gpus]) -> None:
    first = gpus()
    first.control.declare(function("a", "add?value=1", share=HALF))
    assert first.answers("default/a", 1)
    children = first.node.children()
    assert len(children) >= 6
    first.node.kill()
    eventually(lambda: not any(map(alive, children)), "the end of its processes")
    second = gpus()
    assert len(list(second.node.run_dir.glob("mps-*"))) == 1
    second.control.declare(function("a", "add?value=1", share=HALF))
    assert second.answers("default/a", 1)
