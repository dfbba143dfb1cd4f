"""The front when things go wrong or change: the agent dies, functions come and go, SIGTERM."""

import asyncio
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.predictor.fake_agent import FakeAgent, info
from tests.predictor.front_process import Front

ROW = [1, 2, 3, 4]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., tuple[FakeAgent, Front]]]:
    """Starts an agent with functions, and a front of its own with arguments."""
    started: list[Any] = []

    def start(*functions: Any, arguments: tuple[str, ...] = ()) -> tuple[FakeAgent, Front]:
        agent = FakeAgent(tmp_path / "agent.sock", *functions)
        agent.start()
        front = Front(agent.path, *arguments)
        started.append(front)
        return agent, front

    yield start
    for front in started:
        if front.process.poll() is None:
            front.stop()


async def _ask(client: httpx.AsyncClient, number: int) -> tuple[int, httpx.Response]:
    return number, await client.post("/v1/models/double:predict", json={"instances": [[number, 2, 3, 4]]})


@pytest.mark.asyncio
async def test_when_the_agent_dies_each_request_gets_one_right_answer_from_the_next(start: Callable[..., tuple[FakeAgent, Front]]) -> None:
    agent, front = start(info("double"))
    front.ready("double")
    agent.hold()
    async with httpx.AsyncClient(base_url=front.url, timeout=120) as client:
        asked = [asyncio.create_task(_ask(client, 100 + number)) for number in range(30)]
        await asyncio.to_thread(agent.wait, lambda: sum(len(one.parts) for one in agent.submits) >= 25)
        first = {one.id for one in agent.submits}
        agent.kill()
        late = [asyncio.create_task(_ask(client, 200 + number)) for number in range(5)]
        await asyncio.to_thread(front.until, lambda: front.metric("sluice_in_flight_requests", function="default/double") == 35)
        assert front.http.get("/v2/health/ready").status_code == 503
        agent.submits.clear()
        agent.release()
        await asyncio.to_thread(agent.start)
        for number, response in await asyncio.gather(*asked, *late):
            assert response.json() == {"predictions": [[2 * number, 4, 6, 8]]}
    assert first <= {one.id for one in agent.submits}
    assert front.metric("sluice_retries_total", function="default/double") == len(first)
    assert front.metric("sluice_segment_used_bytes") == 0


def test_when_the_agent_stays_away_requests_end_at_their_deadline_and_the_front_recovers(start: Callable[..., tuple[FakeAgent, Front]]) -> None:
    agent, front = start(info("double", timeout_ms=300))
    front.ready("double")
    agent.kill()
    front.until(lambda: front.http.get("/v2/health/ready").status_code == 503)
    response = front.predict("double", ROW)
    assert response.status_code == 504
    agent.start()
    front.ready("double")
    front.until(lambda: front.predict("double", ROW).status_code == 200)
    assert front.metric("sluice_segment_used_bytes") == 0


def test_a_front_that_is_there_before_its_agent_waits_for_it(tmp_path: Path) -> None:
    front = Front(tmp_path / "agent.sock")
    unknown = front.predict("double", ROW)
    assert unknown.status_code == 503, "it cannot know yet that there is no such model"
    assert unknown.headers["retry-after"]
    assert front.http.get("/v2/health/ready").status_code == 503
    agent = FakeAgent(tmp_path / "agent.sock", info("double"))
    agent.start()
    front.ready("double")
    assert front.stop() == 0


def test_an_agent_that_comes_back_loading_is_waited_for(start: Callable[..., tuple[FakeAgent, Front]]) -> None:
    agent, front = start(info("double"))
    front.ready("double")
    agent.kill()
    agent.functions["default/double"] = info("double", state="loading")
    agent.start()
    front.until(lambda: front.http.get("/v2/health/ready").status_code == 200)
    with httpx.Client(base_url=front.url) as client:
        front.until(lambda: client.get("/v2/models/double/ready").status_code == 503)
    agent.tell(info("double"))
    front.ready("double")
    assert front.predict("double", ROW).json() == {"predictions": [[2, 4, 6, 8]]}


def test_functions_come_change_and_go_while_it_runs(start: Callable[..., tuple[FakeAgent, Front]]) -> None:
    agent, front = start(info("one"))
    front.ready("one")
    assert front.predict("two", ROW).status_code == 404
    agent.tell(info("two", state="loading"))
    front.until(lambda: front.predict("two", ROW).status_code == 503)
    agent.tell(info("two", max_batch=1))
    front.ready("two")
    assert front.predict("two", ROW).json() == {"predictions": [[2, 4, 6, 8]]}
    assert front.predict("two", ROW, ROW).status_code == 400
    agent.tell(info("two", max_batch=2))
    front.until(lambda: front.predict("two", ROW, ROW).status_code == 200)
    agent.remove("default/two")
    front.until(lambda: front.predict("two", ROW).status_code == 404)
    assert 'function="default/two"' not in front.http.get("/metrics").text
    assert front.predict("one", ROW).status_code == 200


@pytest.mark.asyncio
async def test_a_function_that_goes_leaves_no_request_without_an_answer(start: Callable[..., tuple[FakeAgent, Front]]) -> None:
    agent, front = start(info("double"))
    front.ready("double")
    agent.hold()
    async with httpx.AsyncClient(base_url=front.url, timeout=120) as client:
        asked = [asyncio.create_task(_ask(client, number)) for number in range(100, 104)]
        await asyncio.to_thread(front.until, lambda: front.metric("sluice_in_flight_requests", function="default/double") == 4)
        signature = agent.functions["default/double"]
        agent.remove("default/double")
        await asyncio.to_thread(front.until, lambda: front.predict("double", ROW).status_code == 404)
        agent.functions["default/double"] = signature
        agent.release()
        codes = sorted([response.status_code for _, response in await asyncio.gather(*asked)])
    assert codes == [200, 404, 404, 404], "what runs is answered, what waited is told"
    assert front.metric("sluice_segment_used_bytes") == 0


@pytest.mark.asyncio
async def test_sigterm_turns_readiness_off_finishes_what_runs_and_ends(start: Callable[..., tuple[FakeAgent, Front]]) -> None:
    agent, front = start(info("double"), arguments=("--linger-ms", "120000"))
    front.ready("double")
    agent.hold()
    async with httpx.AsyncClient(base_url=front.url, timeout=120) as client:
        asked = [asyncio.create_task(_ask(client, number)) for number in range(100, 110)]
        await asyncio.to_thread(front.until, lambda: front.metric("sluice_in_flight_requests", function="default/double") == 10)
        front.process.send_signal(signal.SIGTERM)
        await asyncio.to_thread(front.until, lambda: front.http.get("/v2/models/double/ready").status_code == 503)
        asked.append(asyncio.create_task(_ask(client, 110)))
        await asyncio.to_thread(front.until, lambda: front.metric("sluice_in_flight_requests", function="default/double") == 11)
        front.process.send_signal(signal.SIGTERM)
        await asyncio.to_thread(front.until, lambda: "stopping" in front.log)
        agent.release()
        for number, response in await asyncio.gather(*asked):
            assert response.json() == {"predictions": [[2 * number, 4, 6, 8]]}
    assert await asyncio.to_thread(front.wait) == 0, front.log


def test_a_port_that_is_taken_ends_it_with_an_error(start: Callable[..., tuple[FakeAgent, Front]]) -> None:
    _, front = start(info("double"))
    port = front.url.rsplit(":", 1)[1]
    with pytest.raises(AssertionError, match="Address already in use"):
        Front(Path("/nowhere/agent.sock"), "--http-port", port)
