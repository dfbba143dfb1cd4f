"""The client alone against a real socket: one outcome for each batch, whatever the agent does."""

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio

from contracts.artifact import TensorSpec
from contracts.errors import DeadlineExceeded, NotFound, SluiceError, Unavailable
from contracts.units import MS, S
from contracts.wire import Answer, FunctionInfo
from predictor.agent_client import AgentClient, Batch
from tests.predictor.fake_agent import DOUBLE, FakeAgent, info

KEY = "default/double"


class Heard:
    """A listener that writes down what it heard, and the client that it listens to."""

    def __init__(self, path: Path, **more: int) -> None:
        self.gone: list[str] = []
        self.retried: list[str] = []
        self.outcomes: dict[int, list[Answer | SluiceError]] = {}
        self.client = AgentClient(str(path), 1 << 16, self, **more)
        self.client.start()

    def on_function(self, info: FunctionInfo) -> None:
        pass

    def on_tokenizer(self, name: str, fd: int) -> None:
        os.close(fd)

    def on_gone(self, key: str) -> None:
        self.gone.append(key)

    def on_retry(self, function: str) -> None:
        self.retried.append(function)

    def submit(self, *values: float, deadline_ns: int = 1 << 62) -> Batch:
        (spec,) = DOUBLE.inputs
        inputs = np.array([values], np.float32)
        placement = self.client.place([(spec, inputs)], [(TensorSpec("y", "FP32", ("batch", 4)), (1, 4), 16)])
        assert placement is not None
        batch = Batch(KEY, [placement], [1], 1 << 62, deadline_ns, lambda batch, outcome: self.outcomes.setdefault(batch.id, []).append(outcome))
        self.client.submit(batch)
        return batch

    def result(self, batch: Batch) -> list[float]:
        (placement,) = batch.placements
        (ref,) = placement.outputs
        found = placement.segment.view(ref, np.dtype(np.float32)).tolist()[0]
        self.client.release(placement)
        return list(found)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(120):
        while not condition():
            await asyncio.sleep(0.002)


@pytest_asyncio.fixture
async def agent(tmp_path: Path) -> AsyncIterator[FakeAgent]:
    agent = FakeAgent(tmp_path / "agent.sock", info("double"))
    agent.start()
    yield agent
    agent.release()
    await asyncio.to_thread(agent.kill)


@pytest.mark.asyncio
async def test_a_batch_is_answered_once_and_leaves_nothing(agent: FakeAgent) -> None:
    heard = Heard(agent.path)
    await until(lambda: heard.client.live(KEY))
    batch = heard.submit(1, 2, 3, 4)
    await until(lambda: heard.outcomes)
    assert [type(outcome) for outcome in heard.outcomes[batch.id]] == [Answer]
    assert heard.result(batch) == [2, 4, 6, 8]
    assert heard.client.segment.used_bytes == 0
    heard.client.close()


@pytest.mark.asyncio
async def test_an_answer_stays_readable_when_the_agent_is_lost_before_it_is_read(agent: FakeAgent) -> None:
    heard = Heard(agent.path)
    await until(lambda: heard.client.live(KEY))
    batch = heard.submit(1, 2, 3, 4)
    await until(lambda: heard.outcomes)
    await asyncio.to_thread(agent.kill)
    await until(lambda: not heard.client.connected)
    agent.start()
    await until(lambda: heard.client.live(KEY))
    other = heard.submit(5, 5, 5, 5)
    await until(lambda: other.id in heard.outcomes)
    assert heard.result(batch) == [2, 4, 6, 8]
    assert heard.result(other) == [10, 10, 10, 10]
    assert heard.client.segment.used_bytes == 0
    heard.client.close()


@pytest.mark.asyncio
async def test_what_was_lost_with_an_agent_goes_to_the_next_in_new_memory_unless_too_late_or_unwanted(agent: FakeAgent) -> None:
    heard = Heard(agent.path)
    await until(lambda: heard.client.live(KEY))
    agent.hold()
    kept, late, unwanted = heard.submit(1, 2, 3, 4), heard.submit(0, 0, 0, 0, deadline_ns=1), heard.submit(9, 9, 9, 9)
    await until(lambda: len(agent.submits) == 3)
    old = heard.client.segment
    await asyncio.to_thread(agent.kill)
    await until(lambda: not heard.client.connected)
    heard.client.cancel(unwanted)
    agent.submits.clear()
    agent.release()
    agent.start()
    await until(lambda: len(heard.outcomes) == 3)
    assert heard.client.segment is not old
    assert [one.id for one in agent.submits] == [kept.id]
    assert heard.retried == [KEY]
    assert heard.result(kept) == [2, 4, 6, 8]
    assert [type(one) for outcomes in (heard.outcomes[late.id], heard.outcomes[unwanted.id]) for one in outcomes] == [DeadlineExceeded, Unavailable]
    for batch in (late, unwanted):
        heard.client.release(batch.placements[0])
    assert heard.client.segment.used_bytes == 0
    heard.client.close()


@pytest.mark.asyncio
async def test_patience_ends_and_what_is_not_announced_again_is_forgotten(agent: FakeAgent) -> None:
    heard = Heard(agent.path, patience_ns=50 * MS, forget_ns=100 * MS)
    await until(lambda: heard.client.live(KEY))
    agent.hold()
    batch = heard.submit(1, 2, 3, 4)
    await until(lambda: agent.submits)
    await asyncio.to_thread(agent.kill)
    await until(lambda: not heard.client.connected)
    assert heard.client.awaited(KEY)
    await until(lambda: heard.outcomes)
    assert [type(outcome) for outcome in heard.outcomes[batch.id]] == [Unavailable]
    assert not heard.client.awaited(KEY)
    assert KEY in heard.client.functions
    del agent.functions[KEY]
    agent.start()
    await until(lambda: heard.gone)
    assert KEY not in heard.client.functions
    heard.client.close()


@pytest.mark.asyncio
async def test_a_removed_function_takes_its_waiting_batches_with_it(agent: FakeAgent) -> None:
    agent.functions[KEY] = info("double", state="loading")
    heard = Heard(agent.path, forget_ns=1 * S)
    await until(lambda: KEY in heard.client.functions)
    batch = heard.submit(1, 2, 3, 4)
    agent.remove(KEY)
    await until(lambda: heard.outcomes)
    assert [type(outcome) for outcome in heard.outcomes[batch.id]] == [NotFound]
    heard.client.close()


@pytest.mark.asyncio
async def test_a_cancelled_batch_still_has_one_outcome(agent: FakeAgent) -> None:
    heard = Heard(agent.path)
    await until(lambda: heard.client.live(KEY))
    agent.hold()
    batch = heard.submit(1, 2, 3, 4)
    heard.client.cancel(batch)
    await until(lambda: heard.outcomes)
    assert agent.cancels == [batch.id]
    assert [type(outcome) for outcome in heard.outcomes[batch.id]] == [Unavailable]
    heard.client.close()
