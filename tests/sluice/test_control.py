from __future__ import annotations

import asyncio
import socket
import threading
from pathlib import Path
from typing import Any

import msgspec
import pytest

from contracts.channel import Channel
from contracts.errors import InvalidArtifact, NotFound, Refused, Unavailable
from contracts.functions import Function, ModelFormat, ModelRef, Share
from contracts.status import NodeStatus
from contracts.wire import Control, Declare, FunctionChanged, FunctionInfo, GetStatus, Grant, Remove, Reply, SetShare, Watch
from sluice import control

FUNCTION = Function(name="a", model=ModelRef(ModelFormat.CATALOG, "mlp"))
STATUS = NodeStatus(pid=1, uptime_ns=2, host_used_bytes=3, host_budget_bytes=4, devices=(), functions=())


@pytest.mark.asyncio
async def test_each_call_sends_its_message_and_gets_its_reply(agent: Any, tmp_path: Path) -> None:
    agent.answer = lambda message: Reply(message.id, status=STATUS if isinstance(message, GetStatus) else None)
    client = control.Client(tmp_path)

    await client.declare(FUNCTION)
    await client.grant(42, ("default/a",))
    await client.set_share("default/a", Share(50))
    await client.remove("default/a")
    assert await client.status() == STATUS

    kinds = [type(message) for message in agent.told]
    assert kinds == [Declare, Grant, SetShare, Remove, GetStatus]
    assert len({message.id for message in agent.told}) == 5
    client.close()


@pytest.mark.asyncio
async def test_replies_out_of_order_reach_their_callers(agent: Any, tmp_path: Path) -> None:
    agent.answer = lambda _: None
    client = control.Client(tmp_path)
    slow = asyncio.create_task(client.remove("slow"))
    quick = asyncio.create_task(client.remove("quick"))
    while len(agent.told) < 2:
        await asyncio.sleep(0)

    agent.channels[0].send(Reply(agent.told[1].id), Reply(999))
    await quick
    assert not slow.done()
    agent.channels[0].send(Reply(agent.told[0].id, error=("Refused", "full", 250)))

    with pytest.raises(Refused, match="full") as caught:
        await slow
    assert caught.value.retry_after_ms == 250
    client.close()


@pytest.mark.asyncio
async def test_an_error_of_the_agent_is_raised_as_itself(agent: Any, tmp_path: Path) -> None:
    agent.answer = lambda message: Reply(message.id, error=("InvalidArtifact", "no such file: 'x'", 0))
    client = control.Client(tmp_path)

    with pytest.raises(InvalidArtifact, match="no such file: 'x'"):
        await client.declare(FUNCTION)
    client.close()


@pytest.mark.asyncio
async def test_calls_under_way_end_with_the_agent(agent: Any, tmp_path: Path) -> None:
    agent.answer = lambda _: None
    client = control.Client(tmp_path)
    call = asyncio.create_task(client.status())
    while not agent.told:
        await asyncio.sleep(0)

    agent.channels[0].close()

    with pytest.raises(Unavailable, match="ended before it answered"):
        await call
    assert client.closed
    with pytest.raises(Unavailable, match="gone"):
        await client.status()


@pytest.mark.asyncio
async def test_a_cancelled_call_does_not_trouble_the_next(agent: Any, tmp_path: Path) -> None:
    agent.answer = lambda _: None
    client = control.Client(tmp_path)
    call = asyncio.create_task(client.status())
    while not agent.told:
        await asyncio.sleep(0)
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)

    agent.channels[0].send(Reply(agent.told[0].id))
    agent.answer = lambda message: Reply(message.id, status=STATUS)

    assert await client.status() == STATUS
    client.close()


@pytest.mark.asyncio
async def test_who_watches_hears_of_changes_to_the_last_before_the_agents_end(agent: Any, tmp_path: Path) -> None:
    client = control.Client(tmp_path)
    heard: list[Function] = []
    await client.watch(heard.append)
    changed = [msgspec.structs.replace(FUNCTION, share=Share(percent)) for percent in range(1, 100)]

    agent.channels[0].send(*(FunctionChanged(FunctionInfo(function, "ready")) for function in changed))
    agent.channels[0].close()
    await client.wait_ended()

    assert [type(message) for message in agent.told] == [Watch]
    assert heard == changed


def test_without_a_node_the_error_says_how_to_start_one(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match=r"no node runs at .*sluice up"):
        control.read_status(tmp_path)


def test_the_blocking_call_gets_reply_error_or_silence(tmp_path: Path) -> None:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(tmp_path / "control.sock"))
    listener.listen()
    answers = iter([Reply(1, status=STATUS), Reply(1, error=("NotFound", "no function 'x'", 0)), None])

    def serve() -> None:
        for answer in answers:
            channel = Channel(listener.accept()[0], Control)
            channel.receive()
            if answer is not None:
                channel.send(answer)
            channel.close()

    server = threading.Thread(target=serve)
    server.start()
    assert control.read_status(tmp_path) == STATUS
    with pytest.raises(NotFound, match="no function 'x'"):
        control.call(tmp_path, lambda id_: Remove(id_, "x"))
    with pytest.raises(Unavailable, match="ended before it answered"):
        control.read_status(tmp_path)
    server.join()
    listener.close()
