"""The devices that a lane can run on."""

from __future__ import annotations

from contracts.errors import InvalidValue
from contracts.wire import Spawn
from predictor.worker.devices.base import Device
from predictor.worker.devices.cpu import CpuDevice


def open_device(spawn: Spawn, slab_fd: int) -> Device:
    """The device that a Spawn names, on its slab; InvalidValue for a kind that this worker does not know."""
    kind = spawn.device.partition(":")[0]
    if kind == "cpu":
        return CpuDevice(slab_fd, spawn.slab_bytes, spawn.sm_percent, spawn.link_bytes_per_s)
    raise InvalidValue("must be cpu:N", key="device", value=spawn.device)
