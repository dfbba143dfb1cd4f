"""MIG instances: which there are, which a GPU can be cut into, and the way from what is there to a plan.

Owns the only calls that change a GPU: it makes and ends instances, on idle GPUs alone, and never switches MIG mode on or off.
Source: the NVML API reference, "Multi Instance GPU Management".
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from contracts.errors import Unavailable
from contracts.units import MIB
from nodeagent.mig import Instance, Profile
from nodeagent.shell.nvml import Nvml, text


class Existing(msgspec.Struct, frozen=True):
    """An instance that is there. `uuid` names it to CUDA, "" while it has no compute instance; `busy`: processes that use it."""

    gpu: int
    id: int
    profile: str
    start: int
    memory_bytes: int
    uuid: str
    busy: tuple[int, ...]


class Step(msgspec.Struct, frozen=True):
    """One thing to do: "end" an instance that is there, or "make" one of a plan."""

    act: str
    gpu: int
    profile: str
    start: int
    function: str = ""


def profiles(nvml: Nvml, gpu: int) -> tuple[Profile, ...]:
    """The sizes that a GPU can be cut into, without those that add only media engines; none while MIG mode is off."""
    return tuple(profile for profile in _all_profiles(nvml, gpu) if "+" not in profile.name)


def existing(nvml: Nvml, gpu: int) -> tuple[Existing, ...]:
    """The instances of a GPU, by their place."""
    uuids = _uuids(nvml, gpu)
    found = []
    for profile in _all_profiles(nvml, gpu):
        for handle in _instances(nvml, gpu, profile):
            info = nvml.library.nvmlGpuInstanceGetInfo(handle)
            uuid, busy = uuids.get(info.id, ("", ()))
            found.append(Existing(gpu, info.id, profile.name, info.placement.start, profile.memory_bytes, uuid, busy))
    return tuple(sorted(found, key=lambda instance: instance.start))


def steps(planned: Sequence[Instance], there: Sequence[Existing]) -> tuple[Step, ...]:
    """What turns the instances that are there into the planned ones. What is as planned stays, and so do GPUs that the plan does not name."""
    gpus = {instance.gpu for instance in planned}
    wanted = {(instance.gpu, instance.profile.name, instance.start) for instance in planned}
    kept = {place for instance in there if (place := (instance.gpu, instance.profile, instance.start)) in wanted}
    end = [Step("end", one.gpu, one.profile, one.start) for one in there if one.gpu in gpus and (one.gpu, one.profile, one.start) not in kept]
    make = [Step("make", one.gpu, one.profile.name, one.start, one.function) for one in planned if (one.gpu, one.profile.name, one.start) not in kept]
    return (*end, *make)


def apply(nvml: Nvml, asked: Sequence[Step]) -> Iterator[Step]:
    """Takes the steps, and gives each back once it is done. Unavailable, before anything is changed, when a GPU that is to change is in use."""
    for gpu in sorted({step.gpu for step in asked}):
        _refuse_busy(nvml, gpu)
    for step in asked:
        try:
            (_end if step.act == "end" else _make)(nvml, step)
        except nvml.library.NVMLError as error:
            raise Unavailable(f"GPU {step.gpu}: cannot {step.act} {step.profile} at slice {step.start}: {error}") from None
        yield step


def _refuse_busy(nvml: Nvml, gpu: int) -> None:
    busy = set(nvml.processes(nvml.handle(gpu)))
    for instance in existing(nvml, gpu):
        busy.update(instance.busy)
    if busy:
        raise Unavailable(f"GPU {gpu} is in use by process {', '.join(map(str, sorted(busy)))}: MIG instances change on idle GPUs only")


def _end(nvml: Nvml, step: Step) -> None:
    library = nvml.library
    for profile in _all_profiles(nvml, step.gpu):
        for handle in _instances(nvml, step.gpu, profile):
            if profile.name == step.profile and library.nvmlGpuInstanceGetInfo(handle).placement.start == step.start:
                for compute in _compute_instances(nvml, handle):
                    library.nvmlComputeInstanceDestroy(compute)
                library.nvmlGpuInstanceDestroy(handle)


def _make(nvml: Nvml, step: Step) -> None:
    """A GPU instance at its place, and one compute instance that takes all of it."""
    library = nvml.library
    profile = next(profile for profile in _all_profiles(nvml, step.gpu) if profile.name == step.profile)
    place = library.c_nvmlGpuInstancePlacement_t(start=step.start, size=profile.memory_slices)
    handle = library.nvmlDeviceCreateGpuInstanceWithPlacement(nvml.handle(step.gpu), profile.id, ctypes.byref(place))
    whole = max(_compute_profiles(nvml, handle), key=lambda found: found.multiprocessorCount)
    library.nvmlGpuInstanceCreateComputeInstance(handle, whole.id)


def _all_profiles(nvml: Nvml, gpu: int) -> list[Profile]:
    library, handle = nvml.library, nvml.handle(gpu)
    found = []
    for number in range(library.NVML_GPU_INSTANCE_PROFILE_COUNT):
        info = nvml.ask(library.nvmlDeviceGetGpuInstanceProfileInfo, handle, number)
        places = None if info is None else _places(nvml, gpu, info.id)
        if info is not None and places:
            starts = tuple(sorted(place.start for place in places))
            name = text(info.name).removeprefix("MIG ")
            found.append(Profile(info.id, name, info.memorySizeMB * MIB, info.multiprocessorCount, places[0].size, starts))
    return found


def _places(nvml: Nvml, gpu: int, profile: int) -> list[Any]:
    library, handle = nvml.library, nvml.handle(gpu)
    count = ctypes.c_uint(0)
    if nvml.ask(library.nvmlDeviceGetGpuInstancePossiblePlacements, handle, profile, None, ctypes.byref(count)) is None:
        return []
    places = (library.c_nvmlGpuInstancePlacement_t * count.value)()
    library.nvmlDeviceGetGpuInstancePossiblePlacements(handle, profile, places, ctypes.byref(count))
    return list(places[: count.value])


def _instances(nvml: Nvml, gpu: int, profile: Profile) -> list[Any]:
    library = nvml.library
    found = (library.c_nvmlGpuInstance_t * len(profile.places))()
    count = ctypes.c_uint(0)
    library.nvmlDeviceGetGpuInstances(nvml.handle(gpu), profile.id, found, ctypes.byref(count))
    return list(found[: count.value])


def _compute_profiles(nvml: Nvml, instance: Any) -> Iterator[Any]:
    library = nvml.library
    for number in range(library.NVML_COMPUTE_INSTANCE_PROFILE_COUNT):
        info = nvml.ask(library.nvmlGpuInstanceGetComputeInstanceProfileInfo, instance, number, library.NVML_COMPUTE_INSTANCE_ENGINE_PROFILE_SHARED)
        if info is not None:
            yield info


def _compute_instances(nvml: Nvml, instance: Any) -> Iterator[Any]:
    library = nvml.library
    for profile in _compute_profiles(nvml, instance):
        found = (library.c_nvmlComputeInstance_t * max(1, profile.instanceCount))()
        count = ctypes.c_uint(0)
        library.nvmlGpuInstanceGetComputeInstances(instance, profile.id, found, ctypes.byref(count))
        yield from found[: count.value]


def _uuids(nvml: Nvml, gpu: int) -> dict[int, tuple[str, tuple[int, ...]]]:
    """GPU instance id -> the UUID of its device, and the processes there."""
    library, handle = nvml.library, nvml.handle(gpu)
    found = {}
    for number in range(nvml.ask(library.nvmlDeviceGetMaxMigDeviceCount, handle) or 0):
        device = nvml.ask(library.nvmlDeviceGetMigDeviceHandleByIndex, handle, number)
        if device is not None:
            found[library.nvmlDeviceGetGpuInstanceId(device)] = (text(library.nvmlDeviceGetUUID(device)), nvml.processes(device))
    return found
