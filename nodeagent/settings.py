"""The constants of a node that its state is built with: parsed once at the entry, frozen from then on."""

from __future__ import annotations

import msgspec

from contracts.units import MIB, MS


class DeviceSpec(msgspec.Struct, frozen=True):
    """A device: its id ("cpu:0"), slab size, and the expected speed of its host link in bytes/s. Devices that name the same `link` share it.

    `exclusive`: its lanes cannot run beside each other, whatever their size.
    """

    id: str
    capacity_bytes: int
    link_bytes_per_s: int = 8_000_000_000
    link: str = ""
    exclusive: bool = False


class Settings(msgspec.Struct, frozen=True):
    """How the policies are set; the defaults are the design's.

    A chunk of a copy has `chunk_bytes`, and more on a link that would be done with it in less than `chunk_ns`: the way from the lane to the agent and
    back must be hidden behind the chunk that is on the link meanwhile.
    """

    window_ns: int = 100 * MS
    chunk_bytes: int = 8 * MIB
    chunk_ns: int = 400_000
    chunks_in_flight: int = 2
    latency_sensitive_weight: int = 4
    skip_limit: int = 25
    max_lanes_per_device: int = 12
    lane_idle_ns: int = 30_000 * MS
    hang_ns: int = 30_000 * MS
