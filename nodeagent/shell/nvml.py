"""What the NVIDIA driver says of its GPUs, as frozen values. Reads only: nothing here changes a setting.

Owns the one connection to NVML. A figure that this GPU or driver does not give is None, or an empty tuple; without a driver there are no GPUs.
Source: the NVML API reference; the package is nvidia-ml-py, which imports as pynvml.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, TypeVar

import msgspec
import pynvml

from contracts.errors import Unavailable

_Found = TypeVar("_Found")
_KIB = 1024
_PROCESS_KINDS = ("nvmlDeviceGetComputeRunningProcesses", "nvmlDeviceGetGraphicsRunningProcesses")
THROTTLING = {
    "power": "nvmlClocksThrottleReasonSwPowerCap",
    "hardware": "nvmlClocksThrottleReasonHwSlowdown",
    "thermal": "nvmlClocksThrottleReasonSwThermalSlowdown",
    "hardware_thermal": "nvmlClocksThrottleReasonHwThermalSlowdown",
    "power_brake": "nvmlClocksThrottleReasonHwPowerBrakeSlowdown",
}
"""Why clocks are held down: our name -> NVML's constant. An idle GPU's low clocks are no throttling."""


class Gpu(msgspec.Struct, frozen=True):
    """What does not change while a GPU serves. `mig`: whether MIG mode is on, None where there is none. `peers`: GPUs that it reads directly."""

    index: int
    uuid: str
    name: str
    bus_id: str
    memory_bytes: int
    pcie_generation: int | None
    pcie_width: int | None
    compute_mode: str | None
    mig: bool | None
    peers: tuple[int, ...]


class Telemetry(msgspec.Struct, frozen=True):
    """What a GPU does now. Utilisation in percent of the last sample period, PCIe in bytes/s over 20 ms, errors since the driver was loaded."""

    busy_percent: int | None
    memory_used_bytes: int | None
    pcie_rx_bytes_per_s: int | None
    pcie_tx_bytes_per_s: int | None
    corrected_errors: int | None
    uncorrected_errors: int | None
    throttled: tuple[str, ...]
    processes: tuple[int, ...]


class Driver(msgspec.Struct, frozen=True):
    """Versions: of the driver ("570.86.15"), and the newest CUDA that it serves, (major, minor)."""

    version: str
    cuda: tuple[int, int]


class Nvml:
    """One NVML session; use as a context manager. `handle` gives NVML's own handle to whoever has more to ask."""

    def __init__(self, library: ModuleType = pynvml) -> None:
        """Unavailable with the reason when no driver answers."""
        self.library: Any = library
        try:
            self.library.nvmlInit()
        except self.library.NVMLError as error:
            raise Unavailable(f"no NVIDIA driver answers on this machine ({error})") from None

    def __enter__(self) -> Nvml:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the session."""
        self.library.nvmlShutdown()

    def driver(self) -> Driver:
        """Of this machine."""
        cuda = self.library.nvmlSystemGetCudaDriverVersion()
        return Driver(text(self.library.nvmlSystemGetDriverVersion()), (cuda // 1000, cuda % 1000 // 10))

    def __len__(self) -> int:
        """How many GPUs there are."""
        return int(self.library.nvmlDeviceGetCount())

    def handle(self, index: int) -> Any:
        """NVML's handle of a GPU."""
        return self.library.nvmlDeviceGetHandleByIndex(index)

    def gpus(self) -> tuple[Gpu, ...]:
        """All GPUs, in NVML's order, which is that of the PCI bus (CUDA_DEVICE_ORDER=PCI_BUS_ID)."""
        return tuple(self._gpu(index) for index in range(len(self)))

    def by_uuid(self, uuid: str) -> Any:
        """NVML's handle of a GPU or MIG instance."""
        return self.library.nvmlDeviceGetHandleByUUID(uuid)

    def telemetry(self, handle: Any) -> Telemetry:
        """What a GPU does now; takes some 50 ms, for PCIe is measured meanwhile."""
        nvml = self.library
        used = self.ask(nvml.nvmlDeviceGetMemoryInfo, handle)
        busy = self.ask(nvml.nvmlDeviceGetUtilizationRates, handle)
        return Telemetry(
            None if busy is None else busy.gpu,
            None if used is None else used.used,
            self._pcie(handle, nvml.NVML_PCIE_UTIL_RX_BYTES),
            self._pcie(handle, nvml.NVML_PCIE_UTIL_TX_BYTES),
            self.ask(nvml.nvmlDeviceGetTotalEccErrors, handle, nvml.NVML_MEMORY_ERROR_TYPE_CORRECTED, nvml.NVML_VOLATILE_ECC),
            self.ask(nvml.nvmlDeviceGetTotalEccErrors, handle, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC),
            self._throttled(handle),
            self.processes(handle),
        )

    def processes(self, handle: Any) -> tuple[int, ...]:
        """Process ids that have a context on a GPU or MIG instance."""
        found = (self.ask(getattr(self.library, kind), handle) for kind in _PROCESS_KINDS)
        return tuple(sorted({process.pid for listed in found if listed for process in listed}))

    def ask(self, question: Callable[..., _Found], *arguments: Any) -> _Found | None:
        """An answer, or None where this GPU or driver has none to give."""
        with contextlib.suppress(self.library.NVMLError):
            return question(*arguments)
        return None

    def _gpu(self, index: int) -> Gpu:
        nvml, handle = self.library, self.handle(index)
        mode = self.ask(nvml.nvmlDeviceGetComputeMode, handle)
        mig = self.ask(nvml.nvmlDeviceGetMigMode, handle)
        return Gpu(
            index,
            text(nvml.nvmlDeviceGetUUID(handle)),
            text(nvml.nvmlDeviceGetName(handle)),
            text(nvml.nvmlDeviceGetPciInfo(handle).busId),
            nvml.nvmlDeviceGetMemoryInfo(handle).total,
            self.ask(nvml.nvmlDeviceGetCurrPcieLinkGeneration, handle),
            self.ask(nvml.nvmlDeviceGetCurrPcieLinkWidth, handle),
            None if mode is None else _COMPUTE_MODES.get(mode, str(mode)),
            None if mig is None else mig[0] == nvml.NVML_DEVICE_MIG_ENABLE,
            tuple(self._peers(index)),
        )

    def _peers(self, index: int) -> Iterator[int]:
        nvml = self.library
        for other in range(len(self)):
            if other != index:
                status = self.ask(nvml.nvmlDeviceGetP2PStatus, self.handle(index), self.handle(other), nvml.NVML_P2P_CAPS_INDEX_READ)
                if status == nvml.NVML_P2P_STATUS_OK:
                    yield other

    def _pcie(self, handle: Any, counter: int) -> int | None:
        found = self.ask(self.library.nvmlDeviceGetPcieThroughput, handle, counter)
        return None if found is None else found * _KIB

    def _throttled(self, handle: Any) -> tuple[str, ...]:
        reasons = self.ask(self.library.nvmlDeviceGetCurrentClocksThrottleReasons, handle) or 0
        return tuple(name for name, constant in THROTTLING.items() if reasons & getattr(self.library, constant))


_COMPUTE_MODES = {0: "default", 1: "exclusive thread", 2: "prohibited", 3: "exclusive process"}


def text(found: str | bytes) -> str:
    """A name as NVML gives it: bytes in some versions of the package."""
    return found.decode() if isinstance(found, bytes) else found
