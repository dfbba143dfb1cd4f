"""The queue of one function: every request leaves once, in order, in batches that are right; and it waits only while that makes sense."""

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from predictor.batching import Batcher, Waiting, joint


def waiting(id_: int, rows: int = 1, dims: object = "a", hurry_ns: int = 1000) -> Waiting:
    return Waiting(id_, rows, dims, hurry_ns)


def busy(*queued: Waiting, max_batch: int = 8) -> Batcher:
    """A queue behind one batch in flight."""
    batcher = Batcher(max_batch, 100)
    batcher.add(waiting(0))
    assert batcher.take(0) == [[0]]
    for one in queued:
        assert batcher.add(one)
    return batcher


CASES: dict[str, tuple[Callable[[], Batcher], int, list[list[int]]]] = {
    "leaves at once when nothing is in flight": (lambda: _with(Batcher(8, 100), waiting(1)), 0, [[1]]),
    "waits while a batch is in flight": (lambda: busy(waiting(1), waiting(2)), 5, []),
    "leaves when it is full": (lambda: busy(*map(waiting, range(1, 5)), max_batch=3), 5, [[1, 2, 3]]),
    "leaves when the slack of the oldest has run out, with all that may join": (lambda: busy(waiting(1, hurry_ns=5), waiting(2)), 5, [[1, 2]]),
    "still waits a moment before": (lambda: busy(waiting(1, hurry_ns=5), waiting(2)), 4, []),
    "one batch leaves when one has returned": (lambda: _returned(busy(waiting(1), waiting(2, dims="b"), waiting(3))), 5, [[1, 3]]),
    "a request that does not fit any more waits for the next batch": (lambda: busy(waiting(1, rows=5), waiting(2, rows=5)), 5, [[1]]),
    "other dimensions never join, and hurry only themselves": (lambda: busy(waiting(1), waiting(2, dims="b", hurry_ns=5)), 5, [[2]]),
    "a request that left the queue hurries nobody": (lambda: _without(busy(waiting(1, hurry_ns=5), waiting(2)), 1), 5, []),
}


def _with(batcher: Batcher, one: Waiting) -> Batcher:
    batcher.add(one)
    return batcher


def _returned(batcher: Batcher) -> Batcher:
    batcher.returned(1)
    return batcher


def _without(batcher: Batcher, id_: int) -> Batcher:
    assert batcher.remove(id_)
    return batcher


@pytest.mark.parametrize(("make", "now_ns", "expected"), CASES.values(), ids=CASES)
def test_which_batches_leave(make: Callable[[], Batcher], now_ns: int, expected: list[list[int]]) -> None:
    assert make().take(now_ns) == expected


def test_a_full_queue_takes_no_more_and_what_is_in_flight_counts() -> None:
    batcher = Batcher(4, 8)
    assert batcher.add(waiting(1, rows=4))
    batcher.take(0)
    assert batcher.add(waiting(2, rows=3))
    assert not batcher.add(waiting(3, rows=2))
    batcher.returned(4)
    assert batcher.add(waiting(3, rows=2))


def test_a_return_that_found_nobody_waiting_lets_nobody_out_later() -> None:
    batcher = busy(max_batch=8)
    batcher.add(waiting(1, hurry_ns=0))
    batcher.take(0)
    batcher.returned(1)
    assert batcher.take(0) == []
    batcher.add(waiting(2))
    assert batcher.take(0) == []


@st.composite
def histories(draw: st.DrawFn) -> tuple[int, list[tuple[str, int, int, int]]]:
    """(max batch, steps): arrivals with rows, dims and slack; removals; returns; time."""
    max_batch = draw(st.integers(1, 6))
    step = st.one_of(
        st.tuples(st.just("arrive"), st.integers(1, max_batch), st.integers(0, 2), st.integers(0, 40)),
        st.tuples(st.just("remove"), st.integers(0, 60), st.just(0), st.just(0)),
        st.tuples(st.just("return"), st.just(0), st.just(0), st.just(0)),
        st.tuples(st.just("wait"), st.integers(1, 20), st.just(0), st.just(0)),
    )
    return max_batch, draw(st.lists(step, max_size=80))


@settings(max_examples=300, deadline=None)
@given(histories())
def test_every_request_leaves_exactly_once_and_never_waits_without_a_reason(history: tuple[int, list[tuple[str, int, int, int]]]) -> None:
    max_batch, steps = history
    batcher = Batcher(max_batch, 40)
    requests: dict[int, Waiting] = {}
    queued: list[int] = []
    flights: list[int] = []
    now_ns = 0
    for kind, first, dims, slack in [*steps, *[("return", 0, 0, 0)] * 200]:
        if kind == "arrive":
            one = Waiting(len(requests), first, dims, now_ns + slack)
            room = sum(requests[id_].rows for id_ in queued) + sum(flights) + first <= 40
            assert batcher.add(one) == room
            if room:
                requests[one.id] = one
                queued.append(one.id)
        elif kind == "remove":
            assert batcher.remove(first) == (first in queued)
            queued = [id_ for id_ in queued if id_ != first]
        elif kind == "return" and flights:
            batcher.returned(flights.pop(0))
        elif kind == "wait":
            now_ns += first
        for ids in batcher.take(now_ns):
            batch = [requests[id_] for id_ in ids]
            assert sum(one.rows for one in batch) <= max_batch
            assert {one.dims for one in batch} == {batch[0].dims}
            assert ids == [id_ for id_ in queued if requests[id_].dims == batch[0].dims][: len(ids)], "order kept, and each leaves once"
            queued = [id_ for id_ in queued if id_ not in ids]
            flights.append(sum(one.rows for one in batch))
        assert flights or not queued, "nothing waits while nothing is in flight"
        assert all(requests[id_].hurry_ns > now_ns for id_ in queued), "nothing waits past its slack"
        assert batcher.wake_ns() == min((requests[id_].hurry_ns for id_ in queued), default=None)
        assert batcher.queued_rows == sum(requests[id_].rows for id_ in queued)
    assert not queued
    assert batcher.rows == 0


JOINT: dict[str, tuple[dict[str, int], dict[str, int], bool]] = {
    "rows do not matter": ({"batch": 1, "seq": 5}, {"batch": 8, "seq": 5}, True),
    "short ones join": ({"batch": 1, "seq": 1}, {"batch": 1, "seq": 64}, True),
    "a short one does not wait for a long one": ({"batch": 1, "seq": 5}, {"batch": 1, "seq": 500}, False),
    "long ones join that are about as long": ({"batch": 1, "seq": 400}, {"batch": 1, "seq": 500}, True),
    "what is not padded must be equal": ({"batch": 1, "seq": 5, "width": 2}, {"batch": 1, "seq": 5, "width": 3}, False),
}


@pytest.mark.parametrize(("one", "other", "join"), JOINT.values(), ids=JOINT)
def test_which_lengths_join(one: dict[str, int], other: dict[str, int], join: bool) -> None:
    assert (joint(one, ("seq",)) == joint(other, ("seq",))) is join


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 5000)), min_size=1, max_size=40))
def test_no_request_of_a_batch_grows_by_64_positions_and_by_half(requests: list[tuple[int, int]]) -> None:
    batcher = Batcher(16, 1000)
    for id_, (rows, length) in enumerate(requests):
        assert batcher.add(Waiting(id_, rows, joint({"batch": rows, "seq": length}, ("seq",)), 0))
    batches = batcher.take(0)
    assert sorted(id_ for ids in batches for id_ in ids) == list(range(len(requests)))
    for ids in batches:
        lengths = [requests[id_][1] for id_ in ids]
        assert all(max(lengths) - length < max(64, length / 2) for length in lengths)


@given(st.integers(1, 10_000), st.integers(1, 10_000), st.integers(1, 10_000))
def test_what_lies_between_two_that_join_joins_them(first: int, second: int, third: int) -> None:
    low, middle, high = (joint({"seq": length}, ("seq",)) for length in sorted((first, second, third)))
    assert low != high or low == middle == high
