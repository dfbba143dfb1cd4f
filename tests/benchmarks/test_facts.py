"""The questions to a GPU, asked of fakes: their answers are what the fakes do, and one that fails stops no other."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from benchmarks.gpu_parts import fact_client, fact_questions, facts
from contracts.units import MIB
from nodeagent.shell.gpus import Gpu
from tests.fakes import gpu
from tests.nodeagent.node import REPOSITORY
from tests.predictor.worker.fake_cuda import FakeCuda

pytestmark = pytest.mark.filterwarnings("ignore:The given buffer is not writable")
FAKE = Gpu(gpu.uuid(0), "Fake H100", gpu.SMS, (9, 0), gpu.TOTAL_BYTES, 13000, "ffff:00:00.0")
COMMANDS = {
    "control": (sys.executable, "-S", str(REPOSITORY / "tests" / "fakes" / "mps_control.py")),
    "program": (sys.executable, "-m", "tests.benchmarks.fake_fact_client"),
    "holder": (sys.executable, "-m", "tests.fakes.holder"),
}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fact_questions, "_BYTES", 4 * MIB)
    monkeypatch.setattr(fact_client, "_COPY_S", 0.1)


@pytest.fixture
def client() -> Iterator[fact_client.Client]:
    driver = FakeCuda(inline=True)
    yield fact_client.Client(driver)
    driver.close()


def asked(*names: str) -> dict[str, dict[str, Any]]:
    return asyncio.run(facts.ask(FAKE, names, **COMMANDS))


def test_what_green_contexts_give() -> None:
    found = asked("green")["green"]
    assert found["50_sms"] == found["50_asked"] == 64
    assert found["50_speed_percent"] == pytest.approx(100 * 64 / 132, rel=1e-4)
    assert "5_sms" not in found, "6 SMs are less than a group"


def test_what_clients_of_one_daemon_see_of_each_other() -> None:
    found = asked("mps_start", "mps_percent", "together", "mps_green", "slab", "fault")
    assert not [answer for answer in found.values() if "failed" in answer], found
    assert found["mps_start"]["lists_clients"] is True
    assert found["mps_percent"]["25_multiprocessors"] == 32
    assert found["together"]["mps_times_longer"] == 1
    assert found["mps_green"]["25_sms"] == 32
    assert found["slab"]["shared"] is True
    assert found["slab"]["valid_after_terminate"] is True
    assert found["fault"]["server_faulted"] is True
    assert "ended at 'works'" in found["fault"]["neighbour_works"]


def test_what_fails_or_hangs_says_why_and_stops_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    async def hangs(stand: fact_questions.Stand) -> fact_questions.Answer:
        await asyncio.Event().wait()
        return {}

    async def fails(stand: fact_questions.Stand) -> fact_questions.Answer:
        return dict(await (await stand.plain()).ask("no_such_verb"))

    monkeypatch.setattr(facts, "_LIMITS", {"hangs": (hangs, 0.1), "fails": (fails, 60.0), "green": (fact_questions.green, 60.0)})
    found = asked("hangs", "fails", "green")
    assert found["hangs"]["failed"] == "no answer within 0.1 s"
    assert "no_such_verb" in found["fails"]["failed"]
    assert "failed" not in found["green"]


def test_what_a_client_finds_of_copies(client: fact_client.Client) -> None:
    pinned = client.pin(2 * MIB)
    assert pinned["read_only"] is pinned["pinned"] is True
    assert pinned["gb_per_s"] > 0
    assert client.pieces(4 * MIB).keys() == {"1_mib", "2_mib", "4_mib"}
    beside = client.copy_while_pinning(2 * MIB)
    assert beside["alone_gb_per_s"] > 0
    assert beside["pinning_longest_ms"] > 0


def test_what_a_client_finds_of_kernels(client: fact_client.Client) -> None:
    assert client.works()
    assert client.repeat(0.05) >= 2
    assert client.graph(3)["replay_ms"] >= 2
    assert client.wait(1024)["asleep_p99_us"] > 0


def test_a_slab_is_read_as_it_was_written(client: fact_client.Client) -> None:
    memory = client.driver.allocate(MIB)
    client.open(client.driver.export(memory).hex(), MIB)
    client.fill(0, MIB // 2, 7)
    assert client.holds(0, MIB // 2, 7)
    assert not client.holds(0, MIB, 7)
