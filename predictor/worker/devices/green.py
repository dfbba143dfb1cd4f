"""A green context: a stream whose work runs on chosen SMs of the device and nowhere else.

Splits the SMs the same way in every process, so that lanes that are given different groups never meet on an SM. Needs the `cuda-bindings` package,
that torch's CUDA wheels bring along.
"""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

from contracts.errors import Unavailable

_HOPPER = 9
_MOST_GROUPS = 128


class Partition(NamedTuple):
    """A stream (a cudaStream_t) on `sms` SMs. `context` keeps it alive."""

    stream: int
    sms: int
    context: object


def split(first_sm: int, sms: int, priority: int) -> Partition:
    """The SMs from the `first_sm`-th on, `sms` of them; both must be whole groups of the device. Unavailable where the driver cannot.

    The primary context must be current. Groups are 8 SMs on Hopper and later and 2 before, as `cuDevSmResourceSplitByCount` aligns them.
    """
    try:
        cu = importlib.import_module("cuda.bindings.driver")
    except ImportError as error:
        raise Unavailable(f"green contexts need the cuda-bindings package ({error})") from None
    try:
        return _split(cu, first_sm, sms, priority)
    except RuntimeError as error:
        # The package's word for a call that the driver does not have.
        raise Unavailable(f"this driver has no green contexts ({error})") from None


def _split(cu: Any, first_sm: int, sms: int, priority: int) -> Partition:
    device = _checked(cu.cuDeviceGet(0))
    whole = _checked(cu.cuDeviceGetDevResource(device, cu.CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM))
    major = _checked(cu.cuDeviceGetAttribute(cu.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device))
    size = 8 if major >= _HOPPER else 2
    groups, count, _ = _checked(cu.cuDevSmResourceSplitByCount(min(_MOST_GROUPS, whole.sm.smCount // size), whole, 0, size))
    if count and groups[0].sm.smCount > 0:
        size = groups[0].sm.smCount
    wanted = sms // size
    # Some SMs of a device are in no whole group: what would reach beyond the last group begins before it.
    first = min(first_sm // size, count - wanted)
    if first_sm % size or sms % size or not wanted or first < 0:
        raise Unavailable(f"{sms} SMs from {first_sm} on are not whole groups of the {count} groups of {size} SMs that the device has")
    chosen = groups[first : first + wanted]
    description = _checked(cu.cuDevResourceGenerateDesc(chosen, wanted))
    context = _checked(cu.cuGreenCtxCreate(description, device, cu.CUgreenCtxCreate_flags.CU_GREEN_CTX_DEFAULT_STREAM.value))
    stream = _checked(cu.cuGreenCtxStreamCreate(context, cu.CUstream_flags.CU_STREAM_NON_BLOCKING.value, priority))
    got = _checked(cu.cuGreenCtxGetDevResource(context, cu.CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM))
    return Partition(int(stream), int(got.sm.smCount), context)


def _checked(result: tuple[Any, ...]) -> Any:
    """What a call gave beside its status; Unavailable when that is not success."""
    if int(result[0]) != 0:
        raise Unavailable(f"the driver cannot make a green context ({result[0]})")
    return result[1] if len(result) == 2 else result[1:]
