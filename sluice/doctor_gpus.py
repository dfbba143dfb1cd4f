"""What `sluice doctor` finds out about each GPU: its facts, its link, and whether a lane can really be held to half of it.

The last is tried as a node does it: an agent of the doctor's own serves a small model on half of the SMs, and its lane has to prove its cap. Nothing
of it is left, and no setting of a GPU is touched.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from contracts.artifact import Signature
from contracts.errors import SluiceError, Unavailable
from contracts.functions import Function, ModelFormat, ModelRef, Share
from contracts.units import GIB, MIB, format_bytes
from nodeagent.shell.gpus import GPUS_COMMAND, Gpu, find_gpus
from nodeagent.shell.nvml import Gpu as NvmlGpu
from nodeagent.shell.nvml import Nvml
from profiler.session import AGENT_COMMAND, Arrays, NodeOptions, started
from sluice.doctor import FAIL, OK, WARN, Check

_LINK_COMMAND = (sys.executable, "-m", "predictor.worker.devices.link")
_LINK_S = 120.0
_HALF = 50
_MODEL = Function("doctor", ModelRef(ModelFormat.CATALOG, "mlp"))
_SLAB_BYTES = 256 * MIB


@dataclass(frozen=True, slots=True)
class Commands:
    """What is started to find things out: lists the GPUs, measures a link (JSON, see predictor/worker/devices/link.py), and serves."""

    gpus: tuple[str, ...] = GPUS_COMMAND
    link: tuple[str, ...] = _LINK_COMMAND
    agent: tuple[str, ...] = AGENT_COMMAND


def examine(sm_backend: str, require_limits: bool, commands: Commands = Commands(), nvml: Callable[[], Nvml] = Nvml) -> list[Check]:
    """Some checks for each visible GPU. A limit that is not enforced is a failure where it is required, else a warning."""
    try:
        gpus = asyncio.run(find_gpus(commands.gpus))
    except Unavailable as error:
        return [Check("GPU", FAIL, error.message, "check the driver: nvidia-smi")]
    if not gpus:
        return [Check("GPU", OK, "none is visible: `sluice up` would use the CPU device")]
    known, driver = _ask_nvml(nvml)
    found = [_pinned()]
    for number, gpu in enumerate(gpus):
        device = f"cuda:{number}"
        found += [_facts(device, gpu, driver), _link(device, gpu, known.get(gpu.uuid), commands.link)]
        if gpu.uuid in known:
            found.append(_mig(device, known[gpu.uuid]))
        found.append(_limits(device, sm_backend, require_limits, commands.agent))
    return found


def _ask_nvml(connect: Callable[[], Nvml]) -> tuple[dict[str, NvmlGpu], str]:
    """What NVML knows of each GPU, by UUID, and the driver's version; nothing where NVML does not answer."""
    try:
        with connect() as nvml:
            return {gpu.uuid: gpu for gpu in nvml.gpus()}, nvml.driver().version
    except Unavailable:
        return {}, "of unknown version"


def _pinned() -> Check:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY or soft >= GIB:
        return Check("pinned memory", OK, "no limit" if soft == resource.RLIM_INFINITY else f"up to {format_bytes(soft)}")
    return Check("pinned memory", WARN, f"locked memory is limited to {format_bytes(soft)}", "ulimit -l unlimited, should pinning fail")


def _facts(device: str, gpu: Gpu, driver: str) -> Check:
    version = f"driver {driver}, CUDA {gpu.driver // 1000}.{gpu.driver % 1000 // 10}"
    kind = "MIG instance of " if gpu.mig else ""
    capability = f"{gpu.capability[0]}.{gpu.capability[1]}"
    return Check(device, OK, f"{kind}{gpu.name}, {gpu.sms} SMs, {format_bytes(gpu.total_bytes)}, compute capability {capability}, {version}")


def _link(device: str, gpu: Gpu, known: NvmlGpu | None, command: Sequence[str]) -> Check:
    name = f"{device} link"
    lanes = f"PCIe generation {known.pcie_generation} x{known.pcie_width}" if known and known.pcie_generation else "PCIe"
    peers = f", reads GPU {', '.join(map(str, known.peers))} directly" if known and known.peers else ""
    try:
        done = subprocess.run([*command], env=_seeing(gpu), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_LINK_S, check=False)
        speeds = json.loads(done.stdout.splitlines()[-1]) if not done.returncode and done.stdout else None
    except (OSError, subprocess.TimeoutExpired, json.JSONDecodeError) as error:
        return Check(name, FAIL, f"{lanes}{peers}; copies could not be measured: {error}", "pip install 'sluice[worker]', with a CUDA build of torch")
    if speeds is None:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        return Check(name, FAIL, f"{lanes}{peers}; copies could not be measured: {last[0]}", "is this a CUDA build of torch, for this driver?")
    to_device, from_device = speeds["h2d_bytes_per_s"] / 1e9, speeds["d2h_bytes_per_s"] / 1e9
    return Check(name, OK, f"{lanes}: {to_device:.1f} GB/s to the device, {from_device:.1f} GB/s back, pinned{peers}")


def _mig(device: str, known: NvmlGpu) -> Check:
    mode = {None: "none on this GPU", False: "off", True: "on: `sluice mig show` lists its instances"}[known.mig]
    if known.compute_mode == "prohibited":
        return Check(f"{device} modes", FAIL, f"compute mode prohibited, MIG {mode}", "nvidia-smi -c DEFAULT (an administrator)")
    return Check(f"{device} modes", OK, f"compute mode {known.compute_mode or 'unknown'}, MIG {mode}")


def _limits(device: str, sm_backend: str, require_limits: bool, agent: tuple[str, ...]) -> Check:
    """Serves a small model on half of the SMs: whoever cannot prove that cap does not answer."""
    name, failed = f"{device} limits", FAIL if require_limits or sm_backend != "auto" else WARN
    advice = "functions of less than 100 % of the SMs will be refused: is nvidia-cuda-mps-control installed, with a driver of CUDA 12.5 or later?"
    try:
        with started(NodeOptions(device, _SLAB_BYTES, host_bytes=_SLAB_BYTES, sm_backend=sm_backend, agent=agent)) as session:
            status = session.status().devices[0]
            held = f"lanes are held by {status.backend} ({status.why})"
            try:
                with session.serving(_MODEL, Share.of(_HALF, _HALF)) as key:
                    signature = session.index(_MODEL).signature
                    with session.caller(key, signature, _zeros(signature)) as caller:
                        caller.call()
            except SluiceError as error:
                return Check(name, failed, f"{held}; half of the SMs is not proven: {error.message}", advice)
    except SluiceError as error:
        return Check(name, FAIL, error.message, "the agent's own words above say more; --sm-backend auto takes what there is")
    return Check(name, OK, f"{held}; proven: a lane of {_HALF} % read its SMs back and measured as much; time quotas hold on any device")


def _zeros(signature: Signature) -> Arrays:
    return {spec.name: np.zeros([1 if isinstance(size, str) else size for size in spec.shape], np.float32) for spec in signature.inputs}


def _seeing(gpu: Gpu) -> dict[str, str]:
    """An environment in which this GPU is the only one."""
    return {**os.environ, "CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": gpu.uuid}
