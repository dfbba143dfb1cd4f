"""Asks the tracing process for a model's features. Owns that process for the time of one call; imports no torch."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping

import msgspec

from contracts.errors import Unavailable, from_wire
from contracts.functions import ModelRef
from profiler.features import Features, decode

_TIMEOUT_S = 600.0


class _Failed(msgspec.Struct, frozen=True):
    error: tuple[str, str] | None = None


def extract(ref: ModelRef, sizes: Mapping[str, int] | None = None, timeout_s: float = _TIMEOUT_S) -> Features:
    """Features of the graph that `ref` names, its named dimensions as `sizes` say; no row is computed.

    InvalidArtifact when the model is broken or its graph cannot be counted, with the reason; Unavailable when the process fails.
    """
    request = msgspec.json.encode({"format": ref.format, "source": ref.source, "sizes": dict(sizes or {})})
    try:
        done = subprocess.run([sys.executable, "-m", "profiler.tracing"], input=request + b"\n", capture_output=True, timeout=timeout_s, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{ref.source}: its graph could not be counted: {error}") from None
    if done.returncode or not done.stdout:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or ["no message"]
        raise Unavailable(f"{ref.source}: the tracing process ended with code {done.returncode}: {last[0]}")
    if failed := msgspec.json.decode(done.stdout, type=_Failed).error:
        raise from_wire(*failed)
    return decode(done.stdout)
