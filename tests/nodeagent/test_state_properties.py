"""NodeState under random histories: the invariants hold after every event, and everything accepted is answered."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contracts.functions import Share
from contracts.units import MIB, MS, S
from nodeagent import events as ev
from nodeagent.settings import Settings
from tests.nodeagent.driver import Driver

SHARES = [(100, 10), (50, 5), (30, 2), (20, 10, 10), (100, 1), (70, 0.01), (10, 3, 20)]


class History:
    """Draws what happens next; every draw comes from `random`, which hypothesis or a seed supplies."""

    def __init__(self, chance: random.Random, devices: int) -> None:
        self.chance = chance
        settings = Settings(chunk_bytes=4 * MIB, chunk_ns=0, max_lanes_per_device=4, hang_ns=2 * S)
        exclusive, links, speed = chance.random() < 0.2, chance.choice((1, 9)), chance.choice((S // 100, S // 10, 8 * S))
        self.driver = Driver(devices, 64 * MIB, settings, exclusive=exclusive, links=links, link_bytes_per_s=speed)
        self.driver.peer_bytes_per_s = chance.choice((0, S, 50 * S, 50 * S))
        self.names: list[str] = []
        self.requests = 0
        self.generations = 0

    def step(self) -> None:
        """One event."""
        driver, chance = self.driver, self.chance
        driver.now_ns += chance.choice((0, 1000, MS, 20 * MS, 300 * MS))
        options: list[tuple[Callable[[], None], float]] = [
            (self.arrive, 8),
            (self.finish, 6),
            (self.copy, 6),
            (self.lane_up, 4),
            (self.pause, 3),
            (self.declare, 1),
            (self.share, 1),
            (self.lose, 1),
            (self.lose_device, 0.2),
            (self.bring_back, 1),
            (self.cancel, 1),
            (self.tick, 1),
            (self.remove, 0.3),
        ]
        (step,) = chance.choices([o for o, _ in options], [w for _, w in options])
        step()

    def declare(self) -> None:
        if len(self.names) >= 12:
            return
        self.generations += 1
        name = f"f{self.generations % 15}"
        share = self.chance.choice(SHARES)
        if self.driver.state.refusal(name, Share.of(*share)) is None:
            cls = self.chance.choice(("latency-sensitive", "best-effort"))
            self.driver.declare(name, share=share, cls=cls, weight_bytes=self.chance.choice((100, MIB, 20 * MIB, 30 * MIB, 60 * MIB)), max_queue=20)
            self.names = [*(n for n in self.names if n != name), name]

    def remove(self) -> None:
        if self.names:
            name = self.names.pop(self.chance.randrange(len(self.names)))
            self.driver.send(ev.FunctionRemoved(name))

    def share(self) -> None:
        if self.names:
            name, share = self.chance.choice(self.names), Share.of(*self.chance.choice(SHARES))
            if self.driver.state.refusal(name, share) is None:
                self.driver.send(ev.ShareChanged(name, share))

    def arrive(self) -> None:
        self.requests += 1
        name = self.chance.choice([*self.names, "nobody"])
        timeout_ns = self.chance.choice((MS, 50 * MS, 2 * S, 100 * S))
        self.driver.arrive(self.requests, name, self.chance.choice((MS, 80 * MS, S)), timeout_ns, self.chance.choice((1, 1, 4)))

    def cancel(self) -> None:
        if self.requests:
            self.driver.send(ev.RequestCancelled(self.chance.randint(1, self.requests)))

    def finish(self) -> None:
        if self.driver.running:
            lane = self.chance.choice(sorted(self.driver.running))
            request = self.driver.state.lanes[lane].request
            assert request is not None
            if request.extent.resident:
                self.driver.finish(lane, self.chance.choice((1000, MS, 10 * MS, 400 * MS)), ok=self.chance.random() < 0.9)

    def pause(self) -> None:
        if self.driver.preempted:
            self.driver.pause(self.chance.choice(sorted(self.driver.preempted)), self.chance.choice((1000, MS)))

    def copy(self) -> None:
        open_copies = [c for c, (lane, until) in self.driver.copies.items() if lane in self.driver.up and self.driver.copied[c] < until]
        if open_copies:
            self.driver.copy_on(self.chance.choice(open_copies), self.chance.choice((None, None, 4096)))

    def lane_up(self) -> None:
        if self.chance.random() < 0.9:
            self.driver.lanes_up()
        elif self.driver.starting:
            self.driver.lose(self.chance.choice(sorted(self.driver.starting)))

    def lose(self) -> None:
        if self.driver.up:
            self.driver.lose(self.chance.choice(sorted(self.driver.up)))

    def lose_device(self) -> None:
        self.driver.lose_device(self.chance.choice(sorted(self.driver.state.devices)))

    def bring_back(self) -> None:
        self.driver.bring_back(self.chance.choice(sorted(self.driver.state.devices)))

    def tick(self) -> None:
        self.driver.send(ev.Tick())


def play(chance: random.Random, devices: int, steps: int) -> Driver:
    """A whole history, and then its end."""
    history = History(chance, devices)
    for _ in range(steps):
        history.step()
    history.driver.drain()
    return history.driver


@settings(max_examples=20)
@given(st.randoms(use_true_random=False), st.integers(1, 4), st.integers(20, 2000))
def test_any_history_keeps_the_invariants_and_answers_everything(chance: random.Random, devices: int, steps: int) -> None:
    driver = play(chance, devices, steps)
    assert set(driver.outcomes) == driver.accepted


@pytest.mark.parametrize("seed", range(6))
def test_a_long_history_of_thousands_of_events_answers_everything(seed: int) -> None:
    driver = play(random.Random(seed), 1 + seed % 4, 4000)
    assert set(driver.outcomes) == driver.accepted
    assert sum(isinstance(outcome, ev.Answer) for outcome in driver.outcomes.values()) > 100
    assert not driver.state.requests


def test_a_removed_function_leaves_nothing_behind() -> None:
    driver = play(random.Random(99), 2, 1500)
    for name in list(driver.state.functions):
        driver.send(ev.FunctionRemoved(name))
    driver.copy_all()
    assert not driver.state.node.functions
    assert all(device.memory.used_bytes == 0 and not device.memory.extents for device in driver.state.devices.values())
