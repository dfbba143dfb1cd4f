"""Fakes at the seams: an agent that answers control messages, and a predictor process that speaks a little of the protocol."""

from __future__ import annotations

import asyncio
import socket
import sys
import textwrap
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import pytest_asyncio

from contracts.channel import AsyncChannel
from contracts.wire import Control, Message, Reply


class FakeAgent:
    """Listens on control.sock; `answer(message)` gives each reply (None: none). Keeps what it was told."""

    def __init__(self, run_dir: Path) -> None:
        self.told: list[Message] = []
        self.answer: Callable[[Message], Reply | None] = lambda message: Reply(message.id)
        self.channels: list[AsyncChannel] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.bind(str(run_dir / "control.sock"))
        self._socket.listen()
        self._socket.setblocking(False)
        self._task = asyncio.create_task(self._accept())

    async def _accept(self) -> None:
        while True:
            peer, _ = await asyncio.get_running_loop().sock_accept(self._socket)
            channel: list[AsyncChannel] = []

            def on_message(message: Message, _fds: list[int], channel: list[AsyncChannel] = channel) -> None:
                self.told.append(message)
                if (reply := self.answer(message)) is not None:
                    channel[0].send(reply)

            channel.append(AsyncChannel(peer, Control, on_message, lambda _: None))
            self.channels.append(channel[0])

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        for channel in self.channels:
            channel.close()
        self._socket.close()


@pytest_asyncio.fixture
async def agent(tmp_path: Path) -> AsyncIterator[FakeAgent]:
    fake = FakeAgent(tmp_path)
    yield fake
    await fake.close()


_PREDICTOR = """
    import argparse, asyncio, os, pathlib, signal, sys
    from aiohttp import web

    parser = argparse.ArgumentParser()
    parser.add_argument("log"); parser.add_argument("--agent"); parser.add_argument("--http-port", type=int); parser.add_argument("--host")
    given = parser.parse_args()
    log = pathlib.Path(given.log)
    with log.open("a") as file:
        file.write(f"{os.getpid()}\\n")
    if (log.parent / "broken").exists():
        sys.exit("no such thing as luck")

    async def ready(request):
        return web.json_response({"ready": True})

    async def infer(request):
        body = await request.read()
        if body == b"die":
            (log.parent / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if body == b"die once" and not (log.parent / "died").exists():
            (log.parent / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if body == b"wait":
            (log.parent / "waiting").touch()
            while not (log.parent / "go").exists():
                await asyncio.sleep(0.01)
        return web.Response(body=body, headers={"X-Kept": "yes"})

    app = web.Application()
    app.router.add_get("/v2/models/{name}/ready", ready)
    app.router.add_post("/v2/models/{name}/infer", infer)
    web.run_app(app, host=given.host, port=given.http_port, print=None)
"""


@pytest.fixture
def predictor_command(tmp_path: Path) -> tuple[str, ...]:
    """A small HTTP server that echoes bodies; it writes its pid to `log`, and fails to start while `broken` is there (both in tmp_path)."""
    script = tmp_path / "predictor.py"
    script.write_text(textwrap.dedent(_PREDICTOR))
    return (sys.executable, str(script), str(tmp_path / "log"))
