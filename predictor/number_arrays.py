"""Large JSON documents, their long lists of numbers read into arrays at once rather than into an object for each number.

Owns nothing and decides nothing: what is unusual about a document (an array inside a long list, a text that has a bracket in it, a number beyond 64
bits, an error) is left to the ordinary parser. A picture of 150,528 numbers takes a third of the time, during which nothing else is served.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import simdjson

_LEAST_BYTES = 16 << 10
_LEAST_NUMBERS = 64
_BYTES_A_LIST = 256


def loads(body: bytes | memoryview) -> Any | None:
    """The value of a document; None for one that is small or unusual.

    Long lists of numbers are INT64 or FP64 arrays, but for those that are members of the document itself: V1's rows.
    """
    if len(body) < _LEAST_BYTES:
        return None
    body = bytes(body)
    lists = body.count(b"[")
    if lists * _BYTES_A_LIST > len(body):
        return None
    reader = _Reader()
    try:
        value = reader.read(simdjson.Parser().parse(body), 0)
    except (ValueError, TypeError, RuntimeError, RecursionError):
        return None
    return value if reader.lists == lists else None


class _Reader:
    """Turns simdjson's values into Python's. `lists` counts those seen: `as_buffer` would flatten one inside another without a word."""

    def __init__(self) -> None:
        self.lists = 0

    def read(self, value: Any, depth: int) -> Any:
        """A value `depth` levels below the document."""
        if isinstance(value, simdjson.Object):
            names = list(value.keys())
            if len(set(names)) != len(names):
                raise ValueError("a member comes twice")
            return {name: self.read(value[name], depth + 1) for name in names}
        if not isinstance(value, simdjson.Array):
            return value
        self.lists += 1
        first: Any = value[0] if depth >= 2 and len(value) >= _LEAST_NUMBERS else None
        if isinstance(first, bool) or not isinstance(first, int | float):
            return [self.read(element, depth + 1) for element in value]
        return _numbers(value, isinstance(first, int))


def _numbers(numbers: simdjson.Array, whole: bool) -> npt.NDArray[np.generic]:
    """A list of numbers; TypeError where it holds anything else, another list excepted."""
    if not whole:
        return np.frombuffer(numbers.as_buffer(of_type="d"), np.float64)
    try:
        return np.frombuffer(numbers.as_buffer(of_type="i"), np.int64)
    except TypeError:  # a fraction among them
        return _numbers(numbers, False)
