"""Shares of a real node: every nanosecond accounted for, quotas kept, and a change that loses nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import pytest

from benchmarks.node_parts import shares
from benchmarks.node_parts.node import Node, running
from contracts.units import MIB, MS

MEMORY = 96 * MIB


def compete(quotas: Mapping[str, tuple[float, float]], batch_ns: int, seconds: float) -> shares.Competition:
    async def measure() -> shares.Competition:
        async with running(MEMORY) as node:
            return await shares.compete(node, quotas, batch_ns, seconds)

    return asyncio.run(measure())


CASES = {
    "batches shorter than the window": 10 * MS,
    "batches longer than the window": 150 * MS,
}


@pytest.mark.parametrize("batch_ns", CASES.values(), ids=CASES)
def test_saturating_functions_get_the_time_of_their_quotas_and_no_more(batch_ns: int) -> None:
    seconds = 4
    found = compete({"ten": (10, 10), "thirty": (30, 30)}, batch_ns, seconds)

    # What is counted begins and ends anywhere within a batch: one more or less is no error of the share.
    allowed = 1 + 100 * found.batch_ms / 1000 / seconds
    assert found.account_error_ns == 0, "the agent charged other GPU time than the answers report"
    assert found.lost == 0
    assert abs(found.percent["ten"] - 10) <= allowed, found
    assert abs(found.percent["thirty"] - 30) <= allowed, found


def test_what_others_leave_is_borrowed_up_to_the_limit() -> None:
    found = compete({"low": (5, 20), "high": (10, 100)}, 10 * MS, seconds=4)

    assert found.account_error_ns == 0
    assert found.lost == 0
    assert found.percent["low"] <= 22, found
    assert found.percent["high"] >= 30, found


def test_a_share_changes_under_load_and_no_request_is_lost() -> None:
    async def measure() -> tuple[shares.Change, str]:
        async with running(MEMORY) as node:
            return await shares.change(node, changes=4, seconds=0.5), await gone(node)

    async def gone(node: Node) -> str:
        return ", ".join(line.key for line in (await node.status()).functions)

    found, left = asyncio.run(measure())
    assert found.lost == 0
    assert len(found.delays_ms) == 4
    assert left == ""
