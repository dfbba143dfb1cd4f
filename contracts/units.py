"""Units: names for the integers that cross boundaries, and their conversions at the edge.

Inside, time is nanoseconds, memory is bytes, SM is whole percent and a quota is hundredths of a percent (basis points), all integers.
"""

from __future__ import annotations

US = 1_000
MS = 1_000_000
S = 1_000_000_000

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30

WHOLE_QUOTA_BP = 10_000
"""A quota of 100 % in basis points (0.01 % = 1)."""

_SUFFIXES = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": KIB, "MI": MIB, "GI": GIB, "TI": 1 << 40}


def parse_bytes(text: str) -> int:
    """Bytes from a Kubernetes-style quantity ("512Mi", "2G", "1073741824"); ValueError names the text."""
    stripped = text.strip().upper().removesuffix("B")
    digits = stripped.rstrip("KMGTI")
    factor = _SUFFIXES.get(stripped[len(digits) :])
    try:
        value = float(digits)
    except ValueError:
        value = -1.0
    if factor is None or not 0 <= value < float("inf"):
        raise ValueError(f"{text!r} is no size in bytes: write 512Mi, 2G or a whole number")
    return round(value * factor)


def format_bytes(count: int) -> str:
    """A size as people read it: 438.0 MiB."""
    value = float(count)
    for suffix in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024 or suffix == "GiB":
            break
        value /= 1024
    return f"{count} B" if suffix == "B" else f"{value:.1f} {suffix}"


def ms(ns: int) -> float:
    """Nanoseconds as milliseconds, for people and metrics."""
    return ns / MS
