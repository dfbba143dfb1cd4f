"""`python -m nodeagent.shell.cuda_driver`: the GPUs that CUDA shows here, as JSON, asked of the driver library itself.

A process of its own, because a process that has asked is a client of the driver until it ends. It makes no context and needs no torch; it sees what
its environment shows (CUDA_VISIBLE_DEVICES; a MIG instance only if that names one). Source: the CUDA driver API, "Device Management".
"""

from __future__ import annotations

import ctypes
import json
import sys
import uuid
from typing import Any

_LIBRARY = "libcuda.so.1"
_NO_DEVICE = 100
_SM_COUNT, _MAJOR, _MINOR = 16, 75, 76
_P2P_ACCESS, _P2P_NATIVE_ATOMICS = 2, 3
_NAME_BYTES = 256
_MIG = " MIG "
"""In the name of a MIG instance: NVIDIA H100 80GB HBM3 MIG 1g.10gb."""


class DriverError(Exception):
    """The driver refused a call."""


def read(cuda: Any) -> list[dict[str, object]]:
    """The visible GPUs in PCI order; none when there is none. `cuda` is the loaded driver library. DriverError when it cannot say."""
    code = cuda.cuInit(0)
    if code == _NO_DEVICE:
        return []
    _check(cuda, code, "cuInit")
    driver, count = ctypes.c_int(), ctypes.c_int()
    _check(cuda, cuda.cuDriverGetVersion(ctypes.byref(driver)), "cuDriverGetVersion")
    _check(cuda, cuda.cuDeviceGetCount(ctypes.byref(count)), "cuDeviceGetCount")
    found = [_read_device(cuda, index, driver.value) for index in range(count.value)]
    for index, device in enumerate(found):
        device["peers"] = [other["uuid"] for at, other in enumerate(found) if at != index and _linked(cuda, index, at)]
    return found


def _read_device(cuda: Any, index: int, driver: int) -> dict[str, object]:
    device = ctypes.c_int()
    _check(cuda, cuda.cuDeviceGet(ctypes.byref(device), ctypes.c_int(index)), "cuDeviceGet")
    name, bus_id, total = ctypes.create_string_buffer(_NAME_BYTES), ctypes.create_string_buffer(_NAME_BYTES), ctypes.c_size_t()
    _check(cuda, cuda.cuDeviceGetName(name, ctypes.c_int(_NAME_BYTES), device), "cuDeviceGetName")
    _check(cuda, cuda.cuDeviceGetPCIBusId(bus_id, ctypes.c_int(_NAME_BYTES), device), "cuDeviceGetPCIBusId")
    _check(cuda, cuda.cuDeviceTotalMem_v2(ctypes.byref(total), device), "cuDeviceTotalMem")
    identity = ctypes.create_string_buffer(16)
    # The second version gives a MIG instance its own identity, the first one did not always.
    _check(cuda, cuda.cuDeviceGetUuid_v2(identity, device), "cuDeviceGetUuid")
    text = name.value.decode(errors="replace")
    mig = _MIG in text
    return {
        "uuid": f"{'MIG' if mig else 'GPU'}-{uuid.UUID(bytes=identity.raw)}",
        "name": text,
        "sms": _attribute(cuda, _SM_COUNT, device),
        "capability": [_attribute(cuda, _MAJOR, device), _attribute(cuda, _MINOR, device)],
        "total_bytes": total.value,
        "driver": driver,
        "bus_id": bus_id.value.decode(errors="replace").lower(),
        "mig": mig,
    }


def _linked(cuda: Any, reader: int, read: int) -> bool:
    """Whether one device may read the other's memory, and does it over a link of their own: PCIe has no native atomics.

    Over PCIe a copy between devices takes the way that a copy from the host takes, and is no faster. What the driver does not know is no link.
    """
    value = ctypes.c_int()
    return all(
        not cuda.cuDeviceGetP2PAttribute(ctypes.byref(value), ctypes.c_int(attribute), ctypes.c_int(reader), ctypes.c_int(read)) and value.value == 1
        for attribute in (_P2P_ACCESS, _P2P_NATIVE_ATOMICS)
    )


def _attribute(cuda: Any, attribute: int, device: ctypes.c_int) -> int:
    value = ctypes.c_int()
    _check(cuda, cuda.cuDeviceGetAttribute(ctypes.byref(value), ctypes.c_int(attribute), device), f"cuDeviceGetAttribute {attribute}")
    return value.value


def _check(cuda: Any, code: int, call: str) -> None:
    if code:
        text = ctypes.c_char_p()
        cuda.cuGetErrorName(ctypes.c_int(code), ctypes.byref(text))
        raise DriverError(f"{call} failed: {(text.value or b'unknown error').decode()} ({code})")


def main() -> int:
    """Writes the list; 1 with the reason on standard error when a driver is there and does not work. Without a driver there are no GPUs."""
    try:
        cuda = ctypes.CDLL(_LIBRARY)
    except OSError:
        print("[]")
        return 0
    try:
        print(json.dumps(read(cuda)))
    except DriverError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
