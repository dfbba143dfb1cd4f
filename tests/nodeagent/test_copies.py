"""The link: shared by weight, never idle while there is work, two chunks in flight, and copies that fall behind their deadline first."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from contracts.units import MIB, MS, S
from nodeagent.copies import CopyTask, Link


def task(number: int, nbytes: int = 100 * MIB, weight: int = 1, due_ns: int = 1 << 60) -> CopyTask:
    return CopyTask(number, "cpu:0", number, number, nbytes, weight, 0, due_ns)


def move(link: Link, now_ns: int, chunks: int, order: list[int] | None = None) -> list[int]:
    """Moves `chunks` chunks, oldest grant first; returns whose they were."""
    waiting: list[tuple[int, int]] = [(number, t.granted_bytes) for number, t in link.tasks.items() if t.granted_bytes > t.copied_bytes]
    moved = order if order is not None else []
    for _ in range(chunks):
        waiting += [(granted.copy, granted.granted_bytes) for granted in link.grant(now_ns)]
        if not waiting:
            break
        number, until = waiting.pop(0)
        moved.append(number)
        link.progress(number, until, now_ns)
    return moved


def test_bandwidth_is_shared_by_weight() -> None:
    link = Link(MIB, 2, S)
    link.begin(task(1, weight=4))
    link.begin(task(2, weight=1))
    moved = move(link, 0, 50)
    assert 38 <= moved.count(1) <= 42


def test_a_lone_copy_has_the_whole_link() -> None:
    link = Link(MIB, 2, S)
    link.begin(task(1))
    assert set(move(link, 0, 30)) == {1}
    assert link.tasks[1].copied_bytes >= 30 * MIB


def test_no_more_than_two_chunks_are_in_flight() -> None:
    link = Link(MIB, 2, S)
    for number in range(1, 6):
        link.begin(task(number))
    link.grant(0)
    assert sum(t.granted_bytes for t in link.tasks.values()) == 2 * MIB


def test_a_copy_that_falls_behind_its_deadline_goes_first() -> None:
    link = Link(MIB, 2, S)
    link.begin(task(1, nbytes=64 * MIB, weight=4))
    link.begin(task(2, nbytes=64 * MIB, weight=1, due_ns=64 * MS))
    second = link.tasks[2]
    while second.granted_bytes < 32 * MIB:
        assert set(move(link, 32 * MS, 1)) == {2}, "half its time is gone, half its bytes must be there"
    assert 1 in move(link, 32 * MS, 10)


def test_a_newcomer_is_served_at_once_but_owes_nothing() -> None:
    link = Link(MIB, 2, S)
    link.begin(task(1))
    move(link, 0, 40)
    link.begin(task(2))
    moved = move(link, 0, 20)
    assert 8 <= moved.count(2) <= 11


def test_an_abandoned_copy_frees_its_part_of_the_link() -> None:
    link = Link(MIB, 2, S)
    link.begin(task(1))
    link.grant(0)
    link.abandon(1)
    link.begin(task(2))
    assert link.grant(0)[0].granted_bytes == 2 * MIB


def test_progress_beyond_what_was_granted_is_not_believed() -> None:
    link = Link(MIB, 2, S)
    link.begin(task(1))
    link.grant(0)
    moved = link.progress(1, 50 * MIB, 0)
    assert moved is not None and moved.copied_bytes == 2 * MIB
    assert link.progress(7, 1, 0) is None


@given(st.lists(st.tuples(st.integers(1, 20 * MIB), st.sampled_from([1, 4])), min_size=1, max_size=8), st.integers(1, 4))
def test_every_copy_comes_to_its_end(copies: list[tuple[int, int]], in_flight: int) -> None:
    link = Link(MIB, in_flight, S)
    for number, (nbytes, weight) in enumerate(copies, 1):
        link.begin(task(number, nbytes, weight))
    move(link, 0, sum(-(-nbytes // MIB) for nbytes, _ in copies))
    assert not link.tasks
    assert link.waiting_bytes == 0
