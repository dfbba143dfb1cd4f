"""The memory of one GPU: a private MPS daemon where one can run, a holder process with the slab, and their recovery.

Owns both. The death of either, or a fault of the MPS server, takes every lane of the device along: the owner is told that the slab is lost, ends the
lanes, and once they have gone all is started anew, more slowly each time that it fails. Weights lie in host memory, so nothing is lost but time.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path

from contracts.errors import InvalidValue, SluiceError, Unavailable
from contracts.lane_wire import Hold, LaneReady, MapPeer, SlabReady, Spawn
from contracts.units import MIB, format_bytes
from nodeagent.events import StartLane
from nodeagent.settings import DeviceSpec, Settings
from nodeagent.shell import backends
from nodeagent.shell.backends import Backend, Limits, Unproven
from nodeagent.shell.gpus import Gpu, find_gpu, find_gpus, host_link, near_cpus
from nodeagent.shell.holder import Holder
from nodeagent.shell.mps import PREFIX, MpsDaemon
from nodeagent.shell.options import Options
from nodeagent.shell.slabs import SlabOwner

_log = logging.getLogger(__name__)
_FIRST_DELAY_S = 0.1
_LAST_DELAY_S = 30.0
_CONTEXT_BYTES = 512 * MIB
_ACTIVATION_BYTES = 512 * MIB
_MAX_RESERVE = 0.5
_SEAL_BITS = 62


class CudaSlab:
    """One GPU or MIG instance."""

    def __init__(self, device: str, options: Options, gpu: Gpu, peers: tuple[str, ...]) -> None:
        """Made by `open`."""
        self.peers = peers
        self.fd = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        self._device = device
        self._options = options
        self._gpu = gpu
        self.cpus = near_cpus(gpu.bus_id)
        self._activation_bytes = options.activation_bytes or _ACTIVATION_BYTES
        self._mps: MpsDaemon | None = None
        self._holder: Holder | None = None
        self._lanes: dict[int, tuple[int, int]] = {}
        self._broken = asyncio.Event()
        self._keeper: asyncio.Task[None] | None = None
        self._look: asyncio.Task[None] | None = None
        self._watching: list[asyncio.Task[None]] = []
        self._limits: Limits
        self._slab: SlabReady
        self._seal = 0
        self.spec: DeviceSpec

    @classmethod
    async def open(cls, device: str, options: Options, gpu: Gpu, peers: tuple[str, ...] = ()) -> CudaSlab:
        """The slab of a GPU, ready for lanes. Unavailable when it cannot be had, or cannot be had as it was asked for."""
        slab = cls(device, options, gpu, peers)
        try:
            await slab._choose()
            await slab._hold(options.device_bytes)
        except BaseException:
            await slab.close()
            raise
        ready = slab._slab
        link_bytes_per_s = options.link_bytes_per_s or ready.h2d_bytes_per_s
        slab.spec = DeviceSpec(device, ready.nbytes, link_bytes_per_s, host_link(gpu.bus_id), exclusive=not slab._limits.overlap)
        _log.info("%s: %s, slab of %s, %.1f GB/s from the host", device, gpu.name, format_bytes(ready.nbytes), ready.h2d_bytes_per_s / 1e9)
        return slab

    @property
    def backend(self) -> Backend:
        """How its lanes are held."""
        return self._limits.backend

    @property
    def why(self) -> str:
        """Why so."""
        return self._limits.why

    @property
    def uuid(self) -> str:
        """Of the GPU or MIG instance."""
        return self._gpu.uuid

    def refusal(self, sm_percent: int) -> str | None:
        """As Slab.refusal."""
        reason = self._limits.refusal(sm_percent)
        return None if reason is None else f"{self._device}: {reason}"

    def spawn(self, lane: StartLane) -> Spawn:
        """As Slab.spawn."""
        slab, limits = self._slab, self._limits
        sms = limits.lane_sms(lane.sm_percent)
        first = backends.first_sm(limits, sms, list(self._lanes.values()))
        self._lanes[lane.lane] = (first, sms)
        return Spawn(
            lane=lane.lane,
            device=lane.device,
            sm_percent=lane.sm_percent,
            cls=lane.cls,
            slab_bytes=slab.nbytes,
            threads=self._options.threads,
            link_bytes_per_s=self._options.link_bytes_per_s,
            activation_bytes=self._activation_bytes,
            backend=limits.backend,
            environment=self._environment | limits.environment(lane.sm_percent, lane.cls),
            slab_handle=slab.handle,
            sms=slab.sms,
            lane_sms=sms,
            first_sm=first,
            piece_bytes=slab.piece_bytes,
            whole_ns=slab.whole_ns,
            cpus=self.cpus,
        )

    def lend(self) -> MapPeer:
        """As Slab.lend."""
        return MapPeer(self._device, self._slab.nbytes, 0, self._slab.handle, self._seal)

    def ended(self, lane: int) -> None:
        """As Slab.ended."""
        self._lanes.pop(lane, None)

    def prove(self, lane: StartLane, ready: LaneReady) -> None:
        """As Slab.prove."""
        if ready.sm_percent != lane.sm_percent:
            raise Unproven(f"lane {lane.lane} proved {ready.sm_percent} % of the SMs, not {lane.sm_percent} %")
        warning = self._limits.prove(lane.sm_percent, ready)
        if warning is not None:
            _log.warning("lane %d of %s: %s", lane.lane, self._device, warning)

    def suspect(self) -> None:
        """As Slab.suspect: a client's fatal error takes all clients along, but the daemon stays and says so."""
        if self._mps is not None and self._look is None and not self._broken.is_set():
            self._look = asyncio.get_running_loop().create_task(self._look_for_fault(self._mps))

    async def release(self, pid: int) -> None:
        """As Slab.release."""
        if self._mps is not None and not self._broken.is_set():
            await self._mps.terminate_client(pid)

    def watch(self, owner: SlabOwner) -> None:
        """As Slab.watch."""
        self._keeper = asyncio.get_running_loop().create_task(self._keep(owner))

    def unwatch(self) -> None:
        """As Slab.unwatch."""
        if self._keeper is not None:
            self._keeper.cancel()

    async def close(self) -> None:
        """As Slab.close."""
        self.unwatch()
        tasks = [task for task in (self._keeper, self._look) if task is not None]
        if self._look is not None:
            self._look.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._let_go()
        os.close(self.fd)

    @property
    def _environment(self) -> dict[str, str]:
        """What makes a process see this device alone, through the daemon if there is one."""
        found = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": self._gpu.uuid}
        return found if self._mps is None else found | self._mps.environment

    async def _choose(self) -> None:
        """Finds out what can hold lanes here, by trying it. Said once, loudly where it is less than MPS."""
        asked, no_mps = self._options.sm_backend, "it was not asked for"
        if asked != Backend.QUOTA:
            try:
                await self._start_mps()
                no_mps = ""
            except Unavailable as error:
                no_mps = error.message
                await self._let_go()
        self._limits = backends.choose(self._gpu, no_mps, asked)
        if self._limits.backend is Backend.QUOTA and self._options.require_limits:
            raise Unavailable(f"{self._device}: nothing here can hold a lane to its SMs ({self.why}), and --require-limits was given")
        level = logging.INFO if self._limits.overlap else logging.WARNING
        _log.log(level, "%s: lanes are held to their SMs by %s: %s", self._device, self.backend, self.why)

    async def _start_mps(self) -> None:
        self._mps = MpsDaemon(self._options.mps_command, self._options.run_dir, self._gpu.uuid)
        await self._mps.start()

    async def _hold(self, nbytes: int) -> None:
        """Starts the holder, and watches it and the daemon from then on."""
        holder = self._holder = Holder(self._options.holder_command, self._environment)
        reserve_bytes = Settings().max_lanes_per_device * (self._activation_bytes + _CONTEXT_BYTES)
        reserve_bytes = min(reserve_bytes, int(self._gpu.total_bytes * _MAX_RESERVE))
        self._seal = 1 + secrets.randbits(_SEAL_BITS) if self.peers else 0
        self._slab = await holder.start(Hold(self._device, nbytes, reserve_bytes, self.cpus, self._seal))
        if self._slab.sms != self._gpu.sms:
            raise Unavailable(f"{self._device} has {self._gpu.sms} SMs, its slab holder sees {self._slab.sms}: another MPS daemon may hold it")
        if self._mps is not None and holder.pid not in await self._mps.clients():
            _log.warning("%s: the MPS server does not list the slab holder (pid %d) among its clients", self._device, holder.pid)
        deaths = [holder.died] + ([] if self._mps is None else [self._mps.died])
        self._watching = [asyncio.get_running_loop().create_task(self._break_after(death)) for death in deaths]

    async def _break_after(self, death: asyncio.Event) -> None:
        await death.wait()
        self._broken.set()

    async def _look_for_fault(self, mps: MpsDaemon) -> None:
        if await mps.faulted() and self._mps is mps:
            _log.error("%s: the MPS server is faulty: all its clients are lost", self._device)
            self._broken.set()
        self._look = None

    async def _keep(self, owner: SlabOwner) -> None:
        """Starts daemon and holder anew whenever one of them has gone."""
        while True:
            await self._broken.wait()
            dead = [name for name, of in (("slab holder", self._holder), ("MPS daemon", self._mps)) if of is not None and of.died.is_set()]
            _log.error("%s is lost (%s): its lanes end, and all is started anew", self._device, " and ".join(dead) or "a fault")
            owner.slab_lost(self._device)
            await owner.lanes_gone(self._device)
            delay_s = _FIRST_DELAY_S
            while not await self._revived():
                await asyncio.sleep(delay_s)
                delay_s = min(2 * delay_s, _LAST_DELAY_S)
            _log.info("%s is back", self._device)
            owner.slab_up(self._device)

    async def _revived(self) -> bool:
        """Ends what is left and starts all of it again, as large as it was."""
        await self._let_go()
        try:
            if self._limits.overlap:
                await self._start_mps()
            await self._hold(self._slab.nbytes)
        except (OSError, SluiceError) as error:
            _log.error("%s cannot be brought back yet: %s", self._device, error)
            return False
        return True

    async def _let_go(self) -> None:
        for task in self._watching:
            task.cancel()
        self._watching = []
        self._broken.clear()
        holder, self._holder = self._holder, None
        mps, self._mps = self._mps, None
        if holder is not None:
            await holder.stop()
        if mps is not None:
            await mps.stop()


async def find_all(options: Options) -> dict[str, Gpu]:
    """The GPUs among the devices. InvalidValue for one that is not there, or that two names stand for; Unavailable when the driver does not work."""
    gpus: dict[str, Gpu] = {}
    for device in options.devices:
        if device.startswith("cuda:"):
            gpu = await find_gpu(options.gpus_command, device)
            if any(gpu.uuid == other.uuid for other in gpus.values()):
                raise InvalidValue(f"is {gpu.uuid}, which another --device names already", key="device", value=device)
            gpus[device] = gpu
    if len(gpus) < 2:
        return gpus
    # Only GPUs that one process sees say of each other whether they are linked. A MIG instance is never linked, nor seen beside others.
    whole = [gpu.uuid for gpu in gpus.values() if not gpu.mig]
    together = {gpu.uuid: gpu for gpu in await find_gpus(options.gpus_command, ",".join(whole))} if whole else {}
    return {device: together.get(gpu.uuid, gpu) for device, gpu in gpus.items()}


def peers_of(device: str, gpus: Mapping[str, Gpu]) -> tuple[str, ...]:
    """The devices that this one is linked with."""
    return tuple(other for other, gpu in gpus.items() if gpu.uuid in gpus[device].peers)


def clean_up(run_dir: Path) -> None:
    """Removes what the daemons of a killed agent left; its successor holds the run dir's lock."""
    for folder in run_dir.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            shutil.rmtree(folder)
