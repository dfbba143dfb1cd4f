from __future__ import annotations

from sluice.fronts import Pauses


def test_pauses_grow_while_it_keeps_dying_and_are_short_again_after_a_steady_life() -> None:
    now = [0.0]
    pauses = Pauses(lambda: now[0])

    found = []
    for _ in range(9):
        pauses.started()
        now[0] += 1
        found.append(pauses.next())
    assert found == [0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10.0, 10.0, 10.0]

    pauses.started()
    now[0] += 31
    assert pauses.next() == 0.2
