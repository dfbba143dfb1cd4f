"""A driver that is not there: NVML's calls over GPUs that live in this object, with the structures of the real package.

It keeps NVML's rules: instances lie only at their profile's places, never over one another, and no call succeeds that the real one would refuse.
"""

import ctypes
from types import SimpleNamespace

import pynvml

MIB = 1 << 20
# An H100 80GB as its driver describes it: profile number -> (id, name, SMs, MiB, memory slices, places).
H100 = {
    0: (19, "MIG 1g.10gb", 16, 9984, 1, (0, 1, 2, 3, 4, 5, 6)),
    1: (14, "MIG 2g.20gb", 32, 20096, 2, (0, 2, 4)),
    2: (9, "MIG 3g.40gb", 60, 40448, 4, (0, 4)),
    3: (5, "MIG 4g.40gb", 64, 40448, 4, (0,)),
    4: (0, "MIG 7g.80gb", 132, 81152, 8, (0,)),
    7: (20, "MIG 1g.10gb+me", 16, 9984, 1, (0, 1, 2, 3, 4, 5, 6)),
    9: (15, "MIG 1g.20gb", 26, 20096, 2, (0, 2, 4, 6)),
}


class FakeGpu:
    def __init__(self, index, mig=True, processes=(), compute_mode=0):
        self.index, self.mig, self.processes, self.compute_mode = index, mig, list(processes), compute_mode
        self.instances = []
        self.made = 0


class FakeInstance:
    def __init__(self, gpu, number, profile, start, size):
        self.gpu, self.number, self.profile, self.start, self.size = gpu, number, profile, start, size
        self.computes = []
        self.processes = []


class FakeNvml:
    """Stands where the module `pynvml` stands. Handles are Python objects, kept in `_known` where NVML hands out pointers."""

    def __init__(self, *gpus, driver=True):
        self.fake_gpus, self.driver = list(gpus), driver
        self._known = {}

    def __getattr__(self, name):
        """Constants, structures and errors are the real package's; a function that is not faked is not supported, as on an old driver."""
        found = getattr(pynvml, name)
        if not name.startswith("nvml") or not callable(found) or isinstance(found, type):
            return found

        def unsupported(*arguments):
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

        return unsupported

    def nvmlInit(self):
        if not self.driver:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    def nvmlShutdown(self):
        pass

    def nvmlSystemGetDriverVersion(self):
        return "570.86.15"

    def nvmlSystemGetCudaDriverVersion(self):
        return 12080

    def nvmlDeviceGetCount(self):
        return len(self.fake_gpus)

    def nvmlDeviceGetHandleByIndex(self, index):
        return self.fake_gpus[index]

    def nvmlDeviceGetHandleByUUID(self, uuid):
        for gpu in self.fake_gpus:
            for handle in (gpu, *gpu.instances):
                if self.driver and self.nvmlDeviceGetUUID(handle) == uuid:
                    return handle
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)

    def nvmlDeviceGetUUID(self, handle):
        if isinstance(handle, FakeInstance):
            return f"MIG-{handle.gpu.index}-{handle.number}"
        return f"GPU-{handle.index}"

    def nvmlDeviceGetName(self, handle):
        return "NVIDIA H100 80GB HBM3"

    def nvmlDeviceGetPciInfo(self, handle):
        return SimpleNamespace(busId=f"00000000:{handle.index + 1:02X}:00.0".encode())

    def nvmlDeviceGetMemoryInfo(self, handle):
        return SimpleNamespace(total=81559 * MIB, used=512 * MIB, free=81047 * MIB)

    def nvmlDeviceGetComputeMode(self, handle):
        return handle.compute_mode

    def nvmlDeviceGetMigMode(self, handle):
        return [int(handle.mig), int(handle.mig)]

    def nvmlDeviceGetUtilizationRates(self, handle):
        return SimpleNamespace(gpu=37, memory=12)

    def nvmlDeviceGetPcieThroughput(self, handle, counter):
        return 1000 if counter == pynvml.NVML_PCIE_UTIL_RX_BYTES else 2000

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle):
        return pynvml.nvmlClocksThrottleReasonSwPowerCap | pynvml.nvmlClocksThrottleReasonGpuIdle

    def nvmlDeviceGetP2PStatus(self, one, other, kind):
        return pynvml.NVML_P2P_STATUS_OK if {one.index, other.index} == {0, 1} else pynvml.NVML_P2P_STATUS_NOT_SUPPORTED

    def nvmlDeviceGetComputeRunningProcesses(self, handle):
        return [SimpleNamespace(pid=pid) for pid in handle.processes]

    # MIG.

    def nvmlDeviceGetGpuInstanceProfileInfo(self, gpu, number):
        if not gpu.mig or number not in H100:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return _profile_info(*H100[number])

    def nvmlDeviceGetGpuInstancePossiblePlacements(self, gpu, profile, places_ref, count_ref):
        _, _, _, _, size, places = _by_id(profile)
        count_ref._obj.value = len(places)
        for number, start in enumerate(places if places_ref is not None else ()):
            places_ref[number].start, places_ref[number].size = start, size
        return pynvml.NVML_SUCCESS

    def nvmlDeviceGetGpuInstances(self, gpu, profile, found, count_ref):
        mine = [instance for instance in gpu.instances if instance.profile == profile]
        for number, instance in enumerate(mine):
            found[number] = self._pointer(instance, pynvml.c_nvmlGpuInstance_t)
        count_ref._obj.value = len(mine)
        return pynvml.NVML_SUCCESS

    def nvmlGpuInstanceGetInfo(self, handle):
        instance = self._object(handle)
        place = SimpleNamespace(start=instance.start, size=instance.size)
        return SimpleNamespace(id=instance.number, profileId=instance.profile, placement=place)

    def nvmlDeviceCreateGpuInstanceWithPlacement(self, gpu, profile, place_ref):
        start, size = place_ref._obj.start, place_ref._obj.size
        _, _, _, _, asked, places = _by_id(profile)
        over = any(start < one.start + one.size and one.start < start + size for one in gpu.instances)
        if start not in places or size != asked or over:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_INSUFFICIENT_RESOURCES)
        gpu.made += 1
        instance = FakeInstance(gpu, gpu.made, profile, start, size)
        gpu.instances.append(instance)
        return self._pointer(instance, pynvml.c_nvmlGpuInstance_t)

    def nvmlGpuInstanceDestroy(self, handle):
        instance = self._object(handle)
        if instance.computes or instance.processes:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_IN_USE)
        instance.gpu.instances.remove(instance)
        return pynvml.NVML_SUCCESS

    def nvmlGpuInstanceGetComputeInstanceProfileInfo(self, handle, number, engine):
        instance = self._object(handle)
        sms = _by_id(instance.profile)[2]
        offered = {pynvml.NVML_COMPUTE_INSTANCE_PROFILE_1_SLICE: 16, pynvml.NVML_COMPUTE_INSTANCE_PROFILE_4_SLICE: sms}
        if number not in offered:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return SimpleNamespace(id=number, instanceCount=max(1, sms // offered[number]), multiprocessorCount=offered[number])

    def nvmlGpuInstanceCreateComputeInstance(self, handle, profile):
        self._object(handle).computes.append(profile)

    def nvmlGpuInstanceGetComputeInstances(self, handle, profile, found, count_ref):
        instance = self._object(handle)
        mine = [one for one in instance.computes if one == profile]
        for number, _ in enumerate(mine):
            found[number] = self._pointer((instance, profile), pynvml.c_nvmlComputeInstance_t)
        count_ref._obj.value = len(mine)
        return pynvml.NVML_SUCCESS

    def nvmlComputeInstanceDestroy(self, handle):
        instance, profile = self._object(handle)
        instance.computes.remove(profile)
        return pynvml.NVML_SUCCESS

    def nvmlDeviceGetMaxMigDeviceCount(self, gpu):
        return 7 if gpu.mig else 0

    def nvmlDeviceGetMigDeviceHandleByIndex(self, gpu, number):
        cut = [instance for instance in gpu.instances if instance.computes]
        if number >= len(cut):
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return cut[number]

    def nvmlDeviceGetGpuInstanceId(self, device):
        return device.number

    def _pointer(self, kept, kind):
        """A handle as NVML gives it out: a pointer that only NVML can read."""
        address = 4096 * (len(self._known) + 1)
        self._known[address] = kept
        return ctypes.cast(address, kind)

    def _object(self, handle):
        return self._known[ctypes.cast(handle, ctypes.c_void_p).value]


def _by_id(profile):
    return next(found for found in H100.values() if found[0] == profile)


def _profile_info(id_, name, sms, memory, size, places):
    info = pynvml.c_nvmlGpuInstanceProfileInfo_v2_t()
    info.id, info.name, info.multiprocessorCount, info.memorySizeMB = id_, name.encode(), sms, memory
    info.sliceCount, info.instanceCount = min(size, 7), len(places)
    return info
