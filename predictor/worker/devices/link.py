"""`python -m predictor.worker.devices.link`: how fast pinned memory is copied to the one visible GPU and back, as JSON on standard output.

For `sluice doctor`, which runs without torch. Weights only ever go to the device; the way back is that of outputs.
"""

from __future__ import annotations

import json

from contracts.functions import FunctionClass
from contracts.units import MIB
from predictor.worker.devices import driver as seam
from predictor.worker.devices.holder import link_speed, timed_copies

_BYTES = 256 * MIB


def main() -> None:
    """Prints {"h2d_bytes_per_s": ..., "d2h_bytes_per_s": ...}."""
    print(json.dumps(measure(seam.connect("quota", FunctionClass.BEST_EFFORT, 0, 0))))


def measure(driver: seam.Driver) -> dict[str, int]:
    """Bytes per second, both ways, one after the other."""
    memory = driver.allocate(min(_BYTES, driver.free_bytes() // 2))
    to_device, _ = link_speed(driver, memory)
    host = driver.pinned(memory.numel())
    return {"h2d_bytes_per_s": to_device, "d2h_bytes_per_s": timed_copies(driver, host, memory, memory.numel())}


if __name__ == "__main__":
    main()
