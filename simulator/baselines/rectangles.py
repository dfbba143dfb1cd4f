"""Maximal rectangles: where on a GPU, SMs times time, a pod of some size fits (Jylänki 2010, "A thousand ways to pack the bin", best area fit).

Pure geometry in whole percent. Free space is kept as all maximal free rectangles, which overlap; placing one splits those that it cuts and prunes
those that lie within others, and taking one away restructures: free space is found anew from what is left.
"""

from __future__ import annotations

import msgspec


class Rectangle(msgspec.Struct, frozen=True, order=True):
    """`sm` wide from `x`, `quota` high from `y`, in percent of a GPU."""

    x: int
    y: int
    sm: int
    quota: int

    @property
    def area(self) -> int:
        """In ten-thousandths of a GPU."""
        return self.sm * self.quota

    def overlaps(self, other: Rectangle) -> bool:
        """They have more than an edge in common."""
        return self.x < other.x + other.sm and other.x < self.x + self.sm and self.y < other.y + other.quota and other.y < self.y + self.quota

    def contains(self, other: Rectangle) -> bool:
        """The other lies within this one."""
        return self.x <= other.x and self.y <= other.y and other.x + other.sm <= self.x + self.sm and other.y + other.quota <= self.y + self.quota

    def without(self, other: Rectangle) -> list[Rectangle]:
        """The maximal rectangles of what is left when the other, which overlaps it, is cut out: up to four."""
        right, top = self.x + self.sm, self.y + self.quota
        other_right, other_top = other.x + other.sm, other.y + other.quota
        parts = (
            Rectangle(self.x, self.y, other.x - self.x, self.quota),
            Rectangle(other_right, self.y, right - other_right, self.quota),
            Rectangle(self.x, self.y, self.sm, other.y - self.y),
            Rectangle(self.x, other_top, self.sm, top - other_top),
        )
        return [part for part in parts if part.sm > 0 and part.quota > 0]


WHOLE = Rectangle(0, 0, 100, 100)


class Rectangles:
    """One GPU: what is placed and what is free."""

    def __init__(self) -> None:
        self.placed: list[Rectangle] = []
        self.free: list[Rectangle] = [WHOLE]

    @property
    def area(self) -> int:
        """Of all that is placed, in ten-thousandths of the GPU."""
        return sum(rectangle.area for rectangle in self.placed)

    def fit(self, sm: int, quota: int) -> Rectangle | None:
        """The free rectangle with the least area that this size fits into; None when there is none."""
        fitting = (free for free in self.free if free.sm >= sm and free.quota >= quota)
        return min(fitting, key=lambda free: (free.area, min(free.sm - sm, free.quota - quota), free), default=None)

    def place(self, sm: int, quota: int) -> Rectangle | None:
        """Takes a place of this size, at a corner of the rectangle that fits best; None when it fits nowhere."""
        best = self.fit(sm, quota)
        if best is None:
            return None
        taken = Rectangle(best.x, best.y, sm, quota)
        self.placed.append(taken)
        self._cut(taken)
        return taken

    def take_away(self, rectangle: Rectangle) -> None:
        """Its place is free again."""
        self.placed.remove(rectangle)
        self.free = [WHOLE]
        for other in self.placed:
            self._cut(other)

    def _cut(self, taken: Rectangle) -> None:
        parts = {part for free in self.free if free.overlaps(taken) for part in free.without(taken)}
        kept = [free for free in self.free if not free.overlaps(taken)]
        new = [part for part in parts if not any(other.contains(part) for other in kept)]
        self.free = kept + sorted(part for part in new if not any(other is not part and other.contains(part) for other in new))
