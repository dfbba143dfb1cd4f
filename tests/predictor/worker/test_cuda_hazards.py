"""Streams that go on in any order they like: compute never reads weights that have not arrived, nor weights that were evicted while it read them."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import hypothesis.strategies as st
from hypothesis import given, settings

from tests.predictor.worker.fake_cuda import NS_PER_BYTE, PATIENCE_S, FakeCuda
from tests.predictor.worker.rig import KERNEL_NS, SLAB_BYTES, Rig, answer, reader

SHAPES = ((320, 64, 1500), (4096,), (200, 200, 200, 200, 200), (64, 7000))


@st.composite
def plans(draw: st.DrawFn) -> list[tuple[int, int, tuple[int, ...], int, bool]]:
    """(function, place, grants in thousandths, input, preemptible) of batches to come."""
    step = st.tuples(
        st.integers(0, len(SHAPES) - 1),
        st.integers(0, 3),
        st.lists(st.integers(0, 999), max_size=3).map(lambda grants: (*sorted(grants), 1000)),
        st.integers(0, 255),
        st.booleans(),
    )
    return draw(st.lists(step, min_size=1, max_size=12))


@settings(max_examples=60, deadline=None)
@given(plans(), st.integers(0, 1 << 30), st.sampled_from([64, 256, 5000]), st.booleans())
def test_whatever_the_streams_do_answers_are_right_and_reports_only_grow(plan, seed, piece_bytes, graphs) -> None:
    chance = random.Random(seed)
    driver = FakeCuda(pick=chance.choice)
    contents = [chance.randbytes(sum(sizes)) for sizes in SHAPES]
    functions = [reader(driver, f"f{number}", list(sizes), content) for number, (sizes, content) in enumerate(zip(SHAPES, contents, strict=True))]
    rig = Rig(driver, functions, piece_bytes)
    resident: dict[int, int] = {}
    try:
        for turn, (number, place, grants, x, preemptible) in enumerate(plan, start=1):
            function, total, offset, copy = functions[number], len(contents[number]), place * 2048, 0
            if resident.get(number) != offset:
                evict(rig, resident, contents, offset, offset + total, turn)
                copy = turn
                rig.begin(copy, function, offset)
                for grant in grants:
                    rig.grant(copy, total * grant // 1000)
            done, output = rig.run(function, offset, x, copy=copy, preemptible=preemptible)
            assert done.error is None
            assert output == answer(contents[number], x)
            if copy:
                rig.until_copied(copy, total)
                reports = [message.copied_bytes for message in rig.reported if message.copy == copy]
                assert reports == sorted(set(reports))
                resident[number] = offset
            while graphs and rig.device.has_idle_work:
                rig.device.work_idly()
            for recorded in rig.device.graphs._recorded.values():
                recorded.eager_ns = chance.choice((0, 1 << 60))
        assert not rig.failures
    finally:
        rig.close()


def evict(rig: Rig, resident: dict[int, int], contents: list[bytes], start: int, end: int, turn: int) -> None:
    """Forgets what overlaps with a place, and lets others write there at once."""
    assert end <= SLAB_BYTES
    for number in [number for number, offset in resident.items() if offset < end and start < offset + len(contents[number])]:
        offset = resident.pop(number)
        rig.scribble(offset, offset + len(contents[number]), turn)


def test_the_host_issues_a_whole_batch_before_the_first_byte_has_arrived() -> None:
    driver = FakeCuda()
    content = random.Random(1).randbytes(3000)
    function = reader(driver, "f", [1000, 1000, 1000], content)
    rig = Rig(driver, [function])
    try:
        with ThreadPoolExecutor(1) as pool:
            with driver.halted():
                rig.begin(1, function, 0)
                rig.grant(1, 3000)
                batch = pool.submit(rig.run, function, 0, 7, copy=1)
                driver.until(lambda: driver.launched == 3)
                assert not rig.reported
                assert not batch.done()
            done, output = batch.result(PATIENCE_S)
        assert output == answer(content, 7)
        assert done.swap_ns >= 1000 * NS_PER_BYTE
    finally:
        rig.close()


def test_grants_are_issued_back_to_back_without_waiting_for_what_is_on_the_link() -> None:
    driver = FakeCuda()
    function = reader(driver, "f", [3000], bytes(3000))
    rig = Rig(driver, [function], piece_bytes=500)
    try:
        with driver.halted():
            rig.begin(1, function, 0)
            for until in (1000, 2000, 3000):
                rig.grant(1, until)
            driver.until(lambda: driver.copied == 6)
            assert not rig.reported
        rig.until_copied(1, 3000)
        assert [message.copied_bytes for message in rig.reported] == [1000, 2000, 3000]
    finally:
        rig.close()


def test_a_batch_that_may_pause_is_issued_close_to_the_device_and_pauses_after_what_was_issued() -> None:
    driver = FakeCuda()
    content = bytes(range(100))
    function = reader(driver, "f", [10] * 10, content)
    rig = Rig(driver, [function])
    try:
        rig.begin(1, function, 0)
        rig.grant(1, 100)
        rig.until_copied(1, 100)
        done, output = rig.run(function, 0, 1, preemptible=True)
        assert (done.error, output) == (None, answer(content, 1))
        assert driver.most_ahead <= 2
        assert not rig.paused
        rig.page.pause_batch = 2
        done, output = rig.run(function, 0, 2, preemptible=True)
        assert (done.error, output) == (None, answer(content, 2))
        assert [batch for batch, _ in rig.paused] == [2] * 11, "before the model and before each layer"
        assert all(gpu_ns <= KERNEL_NS + 2 * NS_PER_BYTE for _, gpu_ns in rig.paused), "each pause begins the count anew"
        assert done.gpu_ns <= KERNEL_NS + 200 * NS_PER_BYTE
    finally:
        rig.close()
