"""The command line of a node agent, parsed and validated once; everything below receives the frozen result.

Never reads the environment and opens nothing.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from contracts.units import MS, parse_bytes
from nodeagent.shell.backends import SM_BACKENDS
from nodeagent.shell.gpus import GPUS_COMMAND
from nodeagent.shell.hoststore import store_folder
from nodeagent.shell.mps import PATH_BYTES

_SOCKET_PATH_BYTES = 107
_DEVICE = re.compile(r"[a-z]+:[0-9]+|cuda:(GPU|MIG)-[0-9a-fA-F-]+")


class Options(msgspec.Struct, frozen=True):
    """How one agent runs. Memory in bytes, times in ns.

    `device_bytes` 0: all of a GPU that lanes do not need. `link_bytes_per_s` 0: as fast as it goes. `peer_bytes_per_s`
    is between CPU devices, 0: they copy from the host alone; GPUs are asked. `activation_bytes` 0: no bound on a CPU device,
    the default of `cuda_slab` on a GPU. `sm_backend`: what is to hold the lanes of GPUs to their SMs, one of SM_BACKENDS.
    """

    run_dir: Path
    devices: tuple[str, ...]
    device_bytes: int
    host_bytes: int
    store: Path
    link_bytes_per_s: int = 0
    peer_bytes_per_s: int = 0
    window_ns: int = 100 * MS
    threads: int = 1
    activation_bytes: int = 0
    metrics_port: int | None = None
    drain_ns: int = 10_000 * MS
    hang_ns: int = 30_000 * MS
    adopt_ns: int = 60_000 * MS
    remove_store: bool = False
    sm_backend: str = "auto"
    require_limits: bool = False
    worker_command: tuple[str, ...] = (sys.executable, "-m", "predictor.worker")
    loader_command: tuple[str, ...] = (sys.executable, "-m", "models.loader")
    holder_command: tuple[str, ...] = (sys.executable, "-m", "predictor.worker.devices.holder")
    gpus_command: tuple[str, ...] = GPUS_COMMAND
    mps_command: tuple[str, ...] = ("nvidia-cuda-mps-control",)


def parse(arguments: Sequence[str] | None = None) -> Options:
    """Options from a command line (the process's own by default); a wrong one ends the process with a message that names it."""
    parser = argparse.ArgumentParser(prog="python -m nodeagent", description="The only scheduler of a node: queues, tokens, memory, copies, lanes.")
    parser.add_argument("--run-dir", type=Path, required=True, help="folder of the sockets, made with mode 0700")
    parser.add_argument(
        "--device", action="append", type=_device, required=True, metavar="KIND:N", help="a device: cpu:0, cuda:0, cuda:MIG-... (repeatable)"
    )
    parser.add_argument(
        "--device-memory", type=_size, default=0, metavar="BYTES", help="slab of each device: 512Mi, 2G or bytes (default on GPUs: what lanes leave)"
    )
    parser.add_argument("--host-memory", type=_size, required=True, metavar="BYTES", help="budget of the host weight store")
    parser.add_argument("--store", type=Path, help="folder of the host weight store (default: one in /dev/shm that belongs to the run dir)")
    parser.add_argument("--link-bandwidth", type=_size, default=0, metavar="BYTES_PER_S", help="of the CPU device's host link (default: unlimited)")
    parser.add_argument(
        "--peer-bandwidth", type=_size, default=0, metavar="BYTES_PER_S", help="from CPU device to CPU device (default: no such copies)"
    )
    parser.add_argument("--window-ms", type=_positive, default=100, help="the period over which a quota is counted")
    parser.add_argument("--threads", type=_positive, default=1, help="compute threads of a CPU lane")
    parser.add_argument(
        "--activation-memory", type=_size, default=0, metavar="BYTES", help="what a batch may allocate beside weights (default: no bound)"
    )
    parser.add_argument("--metrics-port", type=int, help="serve Prometheus metrics on this port of 127.0.0.1")
    parser.add_argument("--drain-seconds", type=_positive, default=10, help="how long SIGTERM waits for accepted requests")
    parser.add_argument("--hang-seconds", type=_positive, default=30, help="the least time after which a batch that does not end has its lane killed")
    parser.add_argument("--remove-store", action="store_true", help="delete the host weight store at a clean end (else the next agent adopts it)")
    parser.add_argument("--sm-backend", choices=SM_BACKENDS, default="auto", help="what holds the lanes of GPUs to their SMs (default: the best)")
    parser.add_argument("--require-limits", action="store_true", help="do not start on a GPU on which nothing can hold lanes to their SMs")
    given = parser.parse_args(arguments)
    if len(set(given.device)) != len(given.device):
        parser.error(f"argument --device: each device once, got {' '.join(given.device)}")
    gpus = [device for device in given.device if device.startswith("cuda:")]
    if given.device_memory < 1 and len(gpus) < len(given.device):
        parser.error("argument --device-memory: must be greater than 0")
    run_dir = given.run_dir.absolute()
    if len(os.fsencode(run_dir / "control.sock")) > _SOCKET_PATH_BYTES:
        parser.error(f"argument --run-dir: too long for a Unix socket's path ({_SOCKET_PATH_BYTES} bytes with the socket's name): {run_dir}")
    if gpus and len(os.fsencode(run_dir)) + PATH_BYTES > _SOCKET_PATH_BYTES:
        parser.error(f"argument --run-dir: too long for the sockets of MPS ({_SOCKET_PATH_BYTES - PATH_BYTES} bytes at most with a GPU): {run_dir}")
    return Options(
        run_dir=run_dir,
        devices=tuple(given.device),
        device_bytes=given.device_memory,
        host_bytes=given.host_memory,
        store=given.store.absolute() if given.store else store_folder(run_dir),
        link_bytes_per_s=given.link_bandwidth,
        peer_bytes_per_s=given.peer_bandwidth,
        window_ns=given.window_ms * MS,
        threads=given.threads,
        activation_bytes=given.activation_memory,
        metrics_port=given.metrics_port,
        drain_ns=given.drain_seconds * 1000 * MS,
        hang_ns=given.hang_seconds * 1000 * MS,
        remove_store=given.remove_store,
        sm_backend=given.sm_backend,
        require_limits=given.require_limits,
    )


def _size(text: str) -> int:
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number greater than 0, got {text!r}")
    return int(text)


def _device(text: str) -> str:
    if not _DEVICE.fullmatch(text):
        raise argparse.ArgumentTypeError(f"must look like cpu:0 or cuda:0, or cuda: with a UUID, got {text!r}")
    return text
