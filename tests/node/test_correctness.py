"""Answers of a real node whose device is too small for its functions, bit for bit against the same batches run without swapping."""

from __future__ import annotations

import asyncio

import pytest

from benchmarks.node_parts import correctness


def test_every_answer_is_right_on_a_device_that_holds_few_of_the_functions() -> None:
    found = asyncio.run(correctness.measure(functions=40, holds=6, requests=800, seed=11))

    assert (found.requests, found.wrong, found.detail) == (800, 0, "")
    assert found.holds == 6
    assert found.swaps > 40, "hardly anything was swapped: the test would prove nothing"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_ten_thousand_answers_of_two_hundred_functions_are_right() -> None:
    found = asyncio.run(correctness.measure(functions=200, holds=20, requests=10_000, seed=12))

    assert (found.requests, found.wrong, found.detail) == (10_000, 0, "")
    assert found.holds == 20
    assert found.swaps > 5_000
