"""The soak of the benchmark as a test: requests over all protocols amid changes; every answer right, none lost, nothing held afterwards."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from benchmarks.protocol_parts import churn, memory, soak
from tests.protocol.node import Node, until

GROWTH_MIB = 8.0
"""For 100,000 requests; see benchmarks/protocol.py."""


@pytest.fixture(scope="module")
def loaded() -> Iterator[churn.Node]:
    """The soak's own node."""
    with soak.node() as node:
        yield node


@pytest.mark.parametrize("requests", [1_000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_every_request_is_answered_rightly_amid_changes(loaded: churn.Node, requests: int) -> None:
    verdict = asyncio.run(soak.drive(loaded, requests))
    assert not (verdict.wrong or verdict.lost or verdict.changes.failed), str(verdict)
    assert verdict.asked == requests
    assert verdict.right > requests / 2, str(verdict)
    assert verdict.changes.done >= 8, str(verdict)
    node = Node(loaded.server, loaded.run_dir)
    until(lambda: node.segment_bytes() == 0, lambda: f"requests hold {node.segment_bytes():.0f} bytes of the segment")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_memory_is_flat_over_100_000_requests(loaded: churn.Node) -> None:
    footprints = memory.Footprints(loaded.server.process)
    asyncio.run(soak.drive(loaded, 20_000))
    verdict = asyncio.run(soak.drive(loaded, 100_000, lambda done: footprints.sample(done) if done % 2_000 == 0 else None))
    assert not (verdict.wrong or verdict.lost), str(verdict)
    growth = footprints.growth_mib(100_000)
    assert max(growth.values()) < GROWTH_MIB, growth
