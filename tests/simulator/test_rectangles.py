"""Packing SMs x time: nothing overlaps, nothing is lost, and what fits is found."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from simulator.baselines.rectangles import WHOLE, Rectangle, Rectangles

sizes = st.tuples(st.integers(1, 100), st.integers(1, 100))
steps = st.lists(st.one_of(sizes, st.integers(0, 30)), max_size=40)
"""A size is placed, a number takes away one of those that are placed."""


def drawn(rectangles: list[Rectangle]) -> np.ndarray:
    """How many of them cover each percent of the GPU."""
    canvas = np.zeros((100, 100), np.int64)
    for one in rectangles:
        canvas[one.x : one.x + one.sm, one.y : one.y + one.quota] += 1
    return canvas


def fits_somewhere(canvas: np.ndarray, sm: int, quota: int) -> bool:
    sums = np.pad(canvas.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    covered = sums[sm:, quota:] - sums[:-sm, quota:] - sums[sm:, :-quota] + sums[:-sm, :-quota]
    return bool((covered == 0).any())


@given(steps)
def test_no_overlap_no_lost_area_and_what_fits_is_found(steps: list[tuple[int, int] | int]) -> None:
    gpu = Rectangles()
    for step in steps:
        before = drawn(gpu.placed)
        if isinstance(step, int):
            if gpu.placed:
                gpu.take_away(gpu.placed[step % len(gpu.placed)])
        else:
            found = gpu.place(*step)
            assert (found is not None) == fits_somewhere(before, *step)
            assert found is None or ((found.sm, found.quota) == step and WHOLE.contains(found))
        placed, free = drawn(gpu.placed), drawn(gpu.free)
        assert placed.max(initial=0) <= 1, "no overlap"
        assert ((placed == 0) == (free > 0)).all(), "all that is not placed is free, and only that"
        assert gpu.area == placed.sum()
        assert not any(one is not other and one.contains(other) for one in gpu.free for other in gpu.free), "free rectangles are maximal"


def test_the_order_of_leaving_does_not_matter() -> None:
    gpu = Rectangles()
    placed = [gpu.place(sm, quota) for sm, quota in ((50, 40), (50, 60), (24, 30), (12, 20), (6, 40))]
    for rectangle in (placed[2], placed[0], placed[4], placed[1], placed[3]):
        assert rectangle is not None
        gpu.take_away(rectangle)
    assert gpu.free == [WHOLE]


def test_the_smallest_room_that_fits_is_taken() -> None:
    gpu = Rectangles()
    gpu.place(60, 100)
    tall = gpu.place(30, 100)
    assert tall == Rectangle(60, 0, 30, 100)
    assert gpu.place(10, 20) == Rectangle(90, 0, 10, 20)
    gpu.take_away(Rectangle(0, 0, 60, 100))
    assert gpu.place(10, 30) == Rectangle(90, 20, 10, 30), "not in the 60 % that are free, too"
