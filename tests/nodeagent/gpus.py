"""An agent on fake GPUs as the tests drive it: its connections, and its processes by what they are."""

from __future__ import annotations

import numpy as np
import psutil

from contracts.units import S
from contracts.wire import Answer
from tests.faults.census import alive, command
from tests.nodeagent.node import Control, Node, Predictor

ROWS = np.arange(8, dtype="<f4").reshape(2, 4)


class Gpus:
    """An agent on fake GPUs, its connections, and its processes by what they are."""

    def __init__(self, node: Node) -> None:
        self.node = node.ready()
        self.control = Control(node.run_dir)
        self.control.grant()
        self.predictor = Predictor(node.run_dir)

    def find(self, *words: str) -> list[psutil.Process]:
        """Its processes whose command lines hold all of these words."""
        return [child for child in self.node.children() if alive(child) and all(word in " ".join(command(child)) for word in words)]

    def lanes(self) -> list[int]:
        """The processes of its lanes."""
        return [lane.pid for device in self.control.status().devices for lane in device.lanes if lane.pid]

    def state(self, device: int = 0) -> str:
        """Of a device."""
        return self.control.status().devices[device].state

    def back(self) -> bool:
        """Every device is up and serves again."""
        return all(device.state == "up" for device in self.control.status().devices)

    def answers(self, key: str, value: float) -> bool:
        """Whether a function is answered, and rightly. Meanwhile a request may be refused, but then it is so once and for all."""
        batch = self.predictor.submit(key, ROWS, timeout_ns=60 * S)
        if not isinstance(self.predictor.outcome(batch), Answer):
            return False
        np.testing.assert_array_equal(self.predictor.result(batch)[0], ROWS + value)
        return True
