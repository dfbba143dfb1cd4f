"""The devices that a lane can run on."""

from __future__ import annotations

from contracts.errors import InvalidValue
from contracts.lane_wire import Spawn
from predictor.worker.devices import driver
from predictor.worker.devices.base import Device
from predictor.worker.devices.cpu import CpuDevice
from predictor.worker.devices.cuda import CudaDevice


def open_device(spawn: Spawn, slab_fd: int) -> Device:
    """The device that a Spawn names, on its slab; InvalidValue for a kind that this worker does not know. Called by the thread that will compute."""
    kind = spawn.device.partition(":")[0]
    if kind == "cpu":
        return CpuDevice(slab_fd, spawn.slab_bytes, spawn.sm_percent, spawn.link_bytes_per_s)
    if kind == "cuda":
        return CudaDevice(
            driver.connect(spawn.backend, spawn.cls, spawn.first_sm, spawn.lane_sms),
            spawn.slab_handle,
            spawn.slab_bytes,
            piece_bytes=spawn.piece_bytes,
            whole_ns=spawn.whole_ns,
            activation_bytes=spawn.activation_bytes,
        )
    raise InvalidValue("must be cpu:N or cuda:N", key="device", value=spawn.device)
