"""A process that takes all the descriptors that an agent may open: it keeps itself out, and the agent keeps what it needs to go on."""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
from pathlib import Path

from contracts.channel import connect
from contracts.frames import encode
from contracts.wire import PROTOCOL_VERSION, Hello
from tests.faults import census
from tests.faults.real import Agent, Predictor, connected, function, source, until

LIMIT = ("sh", "-c", 'ulimit -n 300 && exec "$@"', "sh")
SEGMENT = 1 << 20


def test_connections_cannot_take_the_descriptors_that_lanes_and_loader_need() -> None:
    with tempfile.TemporaryDirectory(prefix="sluice-hostile-", dir="/tmp") as folder:
        agent = Agent(Path(folder), prefix=LIMIT)
        try:
            with connected(agent) as (control, predictor), contextlib.ExitStack() as stack:
                control.declare(function("mine", source(1)))
                assert predictor.serves("default/mine", source(1))
                for _ in range(400):
                    _say_hello(stack.enter_context(connect(str(agent.run_dir / "agent.sock"))))
                census.kill([*agent.processes("lane"), *agent.processes("fork server")])
                until(lambda: predictor.serves("default/mine", source(1)), "an answer from a new lane")
                control.declare(function("more", source(2)))
                assert predictor.serves("default/more", source(2))
                stack.close()
                until(lambda: _joins(agent), "room for another predictor")
                assert agent.process.poll() is None
        finally:
            agent.end()


def _say_hello(sock: socket.socket) -> None:
    fd = os.memfd_create("sluice-segment", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, SEGMENT)
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        socket.send_fds(sock, [encode(Hello(PROTOCOL_VERSION, SEGMENT))], [fd])
    os.close(fd)


def _joins(agent: Agent) -> bool:
    try:
        late = Predictor(agent.run_dir)
    except (BrokenPipeError, ConnectionResetError):
        return False
    served = late.receive() and late.serves("default/mine", source(1))
    late.close()
    return served
