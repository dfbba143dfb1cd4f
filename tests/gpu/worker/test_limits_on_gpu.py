"""SM caps fail closed: a lane under a real MPS daemon proves its part, and one that does not find its daemon, and has the whole GPU, is refused."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from contracts.errors import Unavailable
from contracts.functions import FunctionClass
from contracts.lane_wire import Hold, LaneReady, SlabReady
from contracts.units import GIB
from nodeagent.shell import backends
from nodeagent.shell.backends import Unproven
from nodeagent.shell.gpus import GPUS_COMMAND, Gpu, find_gpu
from nodeagent.shell.holder import Holder
from nodeagent.shell.mps import MpsDaemon

if TYPE_CHECKING:
    from tests.predictor.worker.conftest import ForkServer, LaneEnd, Stored

pytestmark = pytest.mark.gpu
HOLDER = (sys.executable, "-m", "predictor.worker.devices.holder")


@asynccontextmanager
async def held_under_mps(gpu: Gpu) -> AsyncIterator[tuple[MpsDaemon, SlabReady]]:
    with tempfile.TemporaryDirectory() as folder:
        daemon = MpsDaemon(("nvidia-cuda-mps-control",), Path(folder), gpu.uuid)
        holder = Holder(HOLDER, {"CUDA_VISIBLE_DEVICES": gpu.uuid, **daemon.environment})
        try:
            await daemon.start()
            yield daemon, await holder.start(Hold("cuda:0", GIB, 0))
        finally:
            await holder.stop()
            await daemon.stop()


def spawn(server: ForkServer, slab: SlabReady, percent: int, environment: dict[str, str]) -> LaneEnd:
    return server.spawn(
        device="cuda:0",
        backend="mps",
        sm_percent=percent,
        environment=environment,
        slab_handle=slab.handle,
        slab_bytes=slab.nbytes,
        sms=slab.sms,
        lane_sms=slab.sms * percent // 100,
        piece_bytes=slab.piece_bytes,
        whole_ns=slab.whole_ns,
        activation_bytes=GIB,
    )


@pytest.mark.asyncio
@pytest.mark.skipif(
    not shutil.which("nvidia-cuda-mps-control") and not Path("/usr/local/nvidia/bin/nvidia-cuda-mps-control").exists(),
    reason="MPS is not installed here",
)
async def test_lanes_under_a_daemon_prove_their_part_and_share_a_slab(
    server: ForkServer, stored: Callable[[str], Stored], inputs: Callable[[Stored, int, int], dict[str, np.ndarray]]
) -> None:
    gpu = await find_gpu(GPUS_COMMAND, "cuda:0")
    limits = backends.choose(gpu, "")
    model = stored("mlp?seed=1")
    arrays = inputs(model, 2, 1)
    async with held_under_mps(gpu) as (daemon, slab):
        try:
            lanes = {}
            for percent in (100, 50, 25):
                environment = daemon.environment | limits.environment(percent, FunctionClass.LATENCY_SENSITIVE)
                lanes[percent] = spawn(server, slab, percent, environment)
                limits.prove(percent, _said(lanes[percent]))
            assert {lane.pid for lane in lanes.values()} <= await daemon.clients()
            lanes[50].load("f", model, 0)
            lanes[100].attach("f", model)
            batch = lanes[100].batch("f", model, [arrays], lanes[100].map())
            assert lanes[100].answer(batch).error is None
            assert batch.gives(model.reference(arrays))
        finally:
            server.close_lanes()


@pytest.mark.asyncio
async def test_a_lane_that_does_not_find_its_daemon_is_refused(server: ForkServer, slab: SlabReady, tmp_path: Path) -> None:
    gpu = await find_gpu(GPUS_COMMAND, "cuda:0")
    limits = backends.choose(gpu, "")
    astray = {"CUDA_MPS_PIPE_DIRECTORY": str(tmp_path)} | limits.environment(50, FunctionClass.LATENCY_SENSITIVE)
    try:
        with pytest.raises(Unproven):
            limits.prove(50, _said(spawn(server, slab, 50, astray)))
    finally:
        server.close_lanes()


@pytest.mark.asyncio
async def test_a_daemon_for_a_gpu_that_is_not_there_does_not_start(tmp_path: Path) -> None:
    daemon = MpsDaemon(("nvidia-cuda-mps-control",), tmp_path, "GPU-00000000-0000-0000-0000-000000000000")
    with pytest.raises(Unavailable):
        await daemon.start()
    await daemon.stop()


def _said(lane: LaneEnd) -> LaneReady:
    assert lane.ready is not None
    return lane.ready
