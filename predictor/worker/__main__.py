"""The fork server: loads torch and the networks once, then forks a lane for each Spawn on its socket. The end of the stream ends it, not its lanes.

Stays single-threaded, runs no model and never asks CUDA for anything, so that a fork is safe. Its lanes are reaped by the kernel; the agent learns of
their end by their channels.
"""

from __future__ import annotations

import argparse
import gc
import os
import resource
import signal
import socket
import warnings

from contracts.channel import Channel
from contracts.lane_wire import Spawn
from models import catalogue, networks
from predictor.worker import lane


def main() -> None:
    """Serves the connected stream socket that `--socket` names."""
    parser = argparse.ArgumentParser(prog="python -m predictor.worker", description="Fork server of a node's lanes; started by the node agent.")
    parser.add_argument("--socket", type=int, default=0, metavar="FD", help="a connected Unix stream socket (default: standard input)")
    channel = Channel(_take(parser.parse_args().socket), Spawn)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    warnings.filterwarnings("ignore", "The given buffer is not writable")
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    _load_networks()
    while (received := channel.receive()) is not None:
        spawn, fds = received
        assert isinstance(spawn, Spawn)
        if os.fork() == 0:
            channel.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.environ.update(spawn.environment)
            if spawn.cpus:
                os.sched_setaffinity(0, spawn.cpus)
            lane.serve(spawn, fds)
        for fd in fds:
            os.close(fd)


def _load_networks() -> None:
    """Builds one network of each architecture (without weights): the first costs torch's lazy imports, a second or more, which no lane should pay."""
    for config in {entry.architecture: entry.defaults for entry in reversed(list(catalogue.ENTRIES.values()))}.values():
        networks.construct(config)
    gc.collect()
    gc.freeze()


def _take(fd: int) -> socket.socket:
    """The socket behind a descriptor, moved off standard input, which lanes get from /dev/null."""
    taken = socket.socket(fileno=os.dup(fd))
    os.dup2(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC), fd)
    return taken


if __name__ == "__main__":
    main()
