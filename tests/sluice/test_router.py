"""The router with real predictor processes (small ones that echo) and a fake agent."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest
import pytest_asyncio

from contracts.functions import Function, ModelFormat, ModelRef
from contracts.wire import Grant
from sluice.control import Client
from sluice.ports import free_port
from sluice.predictors import PredictorOptions
from sluice.router import START_HEADER, Router

FUNCTIONS = tuple(Function(name=name, model=ModelRef(ModelFormat.CATALOG, "mlp")) for name in ("a", "b"))
WITHIN_S = 60


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(WITHIN_S):
        while not condition():
            await asyncio.sleep(0.01)


class Bench:
    """A router under test, an HTTP client, and what the processes left in the folder."""

    def __init__(self, folder: Path, command: tuple[str, ...], http: aiohttp.ClientSession, idle_s: float) -> None:
        self.folder = folder
        self.said: list[str] = []
        self.port = free_port("127.0.0.1")
        options = PredictorOptions(folder, "127.0.0.1", lambda *_: None, command=command)
        self.router = Router(options, "127.0.0.1", self.port, FUNCTIONS, idle_s, self.said.append)
        self._http = http

    def pids(self) -> list[int]:
        log = self.folder / "log"
        return [int(line) for line in log.read_text().split()] if log.exists() else []

    async def infer(self, name: str = "a", body: bytes = b"hello") -> tuple[int, bytes, dict[str, str]]:
        async with self._http.post(f"http://127.0.0.1:{self.port}/v2/models/{name}/infer", data=body) as response:
            return response.status, await response.read(), dict(response.headers)

    async def get(self, path: str) -> tuple[int, Any]:
        async with self._http.get(f"http://127.0.0.1:{self.port}{path}") as response:
            return response.status, await response.json()


@pytest_asyncio.fixture
async def bench(request: pytest.FixtureRequest, tmp_path: Path, agent: Any, predictor_command: tuple[str, ...]) -> AsyncIterator[Bench]:
    async with aiohttp.ClientSession() as http:
        bench = Bench(tmp_path, predictor_command, http, getattr(request, "param", 3600.0))
        client = Client(tmp_path)
        await bench.router.start(client)
        yield bench
        for flag in ("go",):
            (tmp_path / flag).touch()
        await bench.router.stop()
        client.close()
    assert [pid for pid in bench.pids() if psutil.pid_exists(pid)] == []


@pytest.mark.asyncio
async def test_many_first_requests_start_one_process_which_is_granted_its_function(bench: Bench, agent: Any) -> None:
    answers = await asyncio.gather(*(bench.infer(body=b"%d" % number) for number in range(20)))

    assert [(status, body) for status, body, _ in answers] == [(200, b"%d" % number) for number in range(20)]
    assert all(float(headers[START_HEADER]) > 0 and headers["X-Kept"] == "yes" for _, _, headers in answers)
    assert len(bench.pids()) == 1
    assert [message for message in agent.told if isinstance(message, Grant)] == [Grant(1, bench.pids()[0], ("default/a",))]


@pytest.mark.asyncio
async def test_a_warm_request_waits_for_no_start_and_another_function_has_its_own_process(bench: Bench) -> None:
    await bench.infer()
    _, _, headers = await bench.infer()
    await bench.infer("b")

    assert START_HEADER not in headers
    assert len(set(bench.pids())) == 2


@pytest.mark.asyncio
@pytest.mark.parametrize("bench", [0.3], indirect=True)
async def test_an_idle_process_ends_and_the_next_request_starts_another(bench: Bench) -> None:
    await bench.infer()
    first = bench.pids()[0]
    await until(lambda: not psutil.pid_exists(first))
    assert any("at zero" in line for line in bench.said)

    status, body, headers = await bench.infer()

    assert (status, body) == (200, b"hello")
    assert float(headers[START_HEADER]) > 0
    assert len(bench.pids()) == 2


@pytest.mark.asyncio
@pytest.mark.parametrize("bench", [0.2], indirect=True)
async def test_a_process_that_works_is_not_idle(bench: Bench) -> None:
    slow = asyncio.create_task(bench.infer(body=b"wait"))
    await until((bench.folder / "waiting").exists)
    # A second function idles for its whole time meanwhile, so the clock has run.
    await bench.infer("b")
    await until(lambda: any("default/b is at zero" in line for line in bench.said))

    (bench.folder / "go").touch()

    assert (await slow)[:2] == (200, b"wait")
    assert len(bench.pids()) == 2


@pytest.mark.asyncio
async def test_a_process_that_cannot_start_is_a_503_with_the_reason_and_not_tried_by_every_request(bench: Bench) -> None:
    (bench.folder / "broken").touch()

    first = await bench.infer()
    answers = [await bench.infer() for _ in range(5)]

    assert first[0] == 503
    assert b"no such thing as luck" in first[1]
    assert int(first[2]["Retry-After"]) >= 1
    assert {status for status, _, _ in answers} == {503}
    assert len(bench.pids()) < 6

    (bench.folder / "broken").unlink()
    async with asyncio.timeout(WITHIN_S):
        while (await bench.infer())[0] != 200:
            await asyncio.sleep(0.05)


@pytest.mark.asyncio
async def test_a_request_whose_process_died_is_run_once_more_on_a_new_one(bench: Bench) -> None:
    status, body, _ = await bench.infer(body=b"die once")

    assert (status, body) == (200, b"die once")
    assert len(bench.pids()) == 2


@pytest.mark.asyncio
async def test_a_request_that_kills_its_process_twice_is_a_503(bench: Bench) -> None:
    status, body, _ = await bench.infer(body=b"die")

    assert status == 503
    assert b"lost twice" in body
    assert len(bench.pids()) == 2


@pytest.mark.asyncio
async def test_stopping_answers_what_was_accepted(bench: Bench) -> None:
    slow = asyncio.create_task(bench.infer(body=b"wait"))
    await until((bench.folder / "waiting").exists)
    stopping = asyncio.create_task(bench.router.stop())
    await asyncio.sleep(0)

    (bench.folder / "go").touch()

    assert (await slow)[:2] == (200, b"wait")
    await stopping


@pytest.mark.asyncio
async def test_after_a_kill_nothing_is_started_any_more(bench: Bench) -> None:
    slow = asyncio.create_task(bench.infer(body=b"wait"))
    await until((bench.folder / "waiting").exists)

    bench.router.kill()

    status, body, _ = await slow
    assert status == 503
    assert b"being stopped" in body
    assert len(bench.pids()) == 1


@pytest.mark.asyncio
async def test_a_function_at_zero_is_ready_and_listed_without_a_process(bench: Bench) -> None:
    assert await bench.get("/v2/models/a/ready") == (200, {"name": "a", "ready": True})
    assert await bench.get("/v2/models") == (200, {"models": ["a", "b"]})
    assert (await bench.get("/v2/health/live"))[0] == 200
    assert bench.pids() == []


@pytest.mark.asyncio
@pytest.mark.parametrize("path", ["/v2/models/nobody", "/v2/models/..%2Fa/ready", "/v1/models/nobody", "/else", "/v2/models//infer"])
async def test_what_is_not_there_is_a_404(bench: Bench, path: str) -> None:
    status, body = await bench.get(path)

    assert status == 404
    assert "error" in body


@pytest.mark.asyncio
async def test_a_new_agent_grants_running_processes_again(bench: Bench, agent: Any) -> None:
    await bench.infer()
    client = Client(bench.folder)

    await bench.router.agent_changed(client)

    grants = [message for message in agent.told if isinstance(message, Grant)]
    assert [(grant.pid, grant.functions) for grant in grants] == [(bench.pids()[0], ("default/a",))] * 2
    client.close()
