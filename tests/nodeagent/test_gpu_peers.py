"""Two linked GPUs down to the driver seam, with real models: weights go from one's slab to the other's, and holders and lanes of either may die."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import psutil
import pytest

from contracts.wire import Failed, Submit
from tests.faults.census import alive, command
from tests.faults.real import Predictor, function, rows_of, source, until
from tests.nodeagent.node import Control, Node, short_folder

MODELS = {f"default/f{seed}": source(seed, width=256, depth=3) for seed in range(3)}
"""Of half a MiB each; a device holds two of them. The link to the host is said to be slow, and copies are too small to find out."""
Served = tuple[Node, Control, Predictor]


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    os.environ |= {"FAKE_BELOW": "driver", "FAKE_NVLINK": "1"}
    try:
        with short_folder() as folder:
            devices = ("--device", "cuda:0", "--device", "cuda:1", "--link-bandwidth", "8Mi")
            node = Node(folder / "run", *devices, module="tests.fakes.gpu_agent", memory="1280Ki", host="64Mi").ready()
            control = Control(node.run_dir)
            control.grant()
            predictor = Predictor(node.run_dir)
            for key, model in MODELS.items():
                control.declare(function(key.removeprefix("default/"), model))
                until(lambda key=key, model=model: predictor.serves(key, model), f"the first answer of {key}")
            yield node, control, predictor
            children = node.children()
            predictor.close()
            control.channel.close()
            assert node.terminate() == 0
            assert not [child for child in children if alive(child)]
            node.remove()
    finally:
        del os.environ["FAKE_BELOW"], os.environ["FAKE_NVLINK"]


def load(predictor: Predictor, count: int) -> list[tuple[str, Submit]]:
    """Batches of all functions, several of each at once."""
    keys = list(MODELS)
    return [(keys[number // 4 % len(keys)], predictor.submit(keys[number // 4 % len(keys)], rows_of(number, 40))) for number in range(count)]


def swap_between_devices(served: Served) -> None:
    """Loads the node until weights have gone from device to device."""
    _, control, predictor = served
    before = sum(device.peer_swaps for device in control.status().devices)

    def swapped() -> bool:
        for key, batch in load(predictor, 24):
            assert predictor.check(batch, MODELS[key]), predictor.outcomes[batch.id]
        return sum(device.peer_swaps for device in control.status().devices) > before

    until(swapped, "weights that go from device to device")


def test_answers_are_those_of_the_model_wherever_its_weights_came_from(served: Served) -> None:
    swap_between_devices(served)


@pytest.mark.parametrize("victim", ["slab holder", "lane"])
@pytest.mark.parametrize("device", [0, 1])
def test_no_answer_is_wrong_when_either_end_dies(served: Served, victim: str, device: int) -> None:
    node, control, predictor = served
    swap_between_devices(served)
    holders = sorted(child.pid for child in node.children() if "tests.predictor.worker.fake_cuda_holder" in command(child))
    lanes = [lane.pid for lane in control.status().devices[device].lanes if lane.pid]
    batches = load(predictor, 36)
    predictor.outcome(batches[5][1])
    pid = holders[device] if victim == "slab holder" else lanes[0]
    os.kill(pid, signal.SIGKILL)
    for key, batch in batches:
        if not predictor.check(batch, MODELS[key]):
            outcome = predictor.outcomes[batch.id]
            assert isinstance(outcome, Failed) and outcome.kind == "Unavailable", outcome
    until(lambda: not psutil.pid_exists(pid) and all(found.state == "up" for found in control.status().devices), "the return of what died")
    swap_between_devices(served)
