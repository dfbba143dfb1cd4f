from __future__ import annotations

import logging

import pytest

from nodeagent.shell.logs import FloodFilter


@pytest.fixture
def clock() -> list[float]:
    return [100.0]


@pytest.fixture
def log(clock: list[float], caplog: pytest.LogCaptureFixture) -> logging.Logger:
    log = logging.getLogger("tests.flood")
    for old in list(log.filters):
        log.removeFilter(old)
    log.addFilter(FloodFilter(most=3, period_s=10, clock=lambda: clock[0]))
    return log


def shout(log: logging.Logger, times: int) -> None:
    for number in range(times):
        log.warning("predictor %d is closed", number)


def test_a_flood_is_cut_off_and_the_next_line_says_by_how_many(log: logging.Logger, clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    shout(log, 1000)
    assert caplog.messages == [f"predictor {number} is closed" for number in range(3)]

    clock[0] += 10
    shout(log, 4)
    assert caplog.messages[3:] == ["predictor 0 is closed (997 more like it were kept back)", "predictor 1 is closed", "predictor 2 is closed"]


def test_other_lines_are_written_meanwhile(log: logging.Logger, caplog: pytest.LogCaptureFixture) -> None:
    shout(log, 1000)
    log.error("lane %d is lost", 7)
    assert caplog.messages[-1] == "lane 7 is lost"


def test_few_lines_are_left_as_they_are(log: logging.Logger, clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(5):
        shout(log, 3)
        clock[0] += 10
    assert caplog.messages == [f"predictor {number} is closed" for number in range(3)] * 5
