"""Which MIG instances a set of functions needs: the smallest instance for each, on the fewest GPUs, at places that the hardware has.

Pure: profiles and their places come from the driver, the plan goes to whoever applies it.
Source: NVIDIA Multi-Instance GPU User Guide (partitioning).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache

import msgspec

from contracts.errors import InvalidValue
from contracts.units import format_bytes


class Profile(msgspec.Struct, frozen=True):
    """A size of instance that a GPU can be cut into. It takes `memory_slices` from one of `places` on."""

    id: int
    name: str
    memory_bytes: int
    sms: int
    memory_slices: int
    places: tuple[int, ...]


class Want(msgspec.Struct, frozen=True):
    """A function that is to have an instance of its own: bytes on the device, and the SMs of a whole GPU that it needs, in percent."""

    function: str
    memory_bytes: int
    sm_percent: int


class Instance(msgspec.Struct, frozen=True):
    """A profile at a memory slice of the GPU with this number, for one function."""

    gpu: int
    start: int
    profile: Profile
    function: str


def plan(wants: Sequence[Want], profiles: Sequence[Profile], gpus: int) -> tuple[Instance, ...]:
    """An instance for each function, on the first of `gpus` GPUs that are alike.

    InvalidValue names the function that fits nowhere, or how many GPUs it would take.
    """
    if not profiles:
        raise InvalidValue("this GPU has no MIG profiles", key="gpu", value=gpus)
    chosen = {want.function: _smallest(want, profiles) for want in wants}
    largest_first = Counter(profile.id for profile in sorted(chosen.values(), key=lambda profile: -profile.memory_slices))
    patterns = _covering(tuple(largest_first.items()), _patterns(tuple(profiles)))
    if len(patterns) > gpus:
        raise InvalidValue(f"these functions need {len(patterns)} GPUs", key="gpus", value=gpus)
    waiting = {profile.id: sorted((name for name, found in chosen.items() if found == profile), reverse=True) for profile in profiles}
    by_id = {profile.id: profile for profile in profiles}
    return tuple(
        Instance(gpu, start, by_id[profile], waiting[profile].pop())
        for gpu, pattern in enumerate(patterns)
        for profile, start in pattern
        if waiting[profile]
    )


def _smallest(want: Want, profiles: Sequence[Profile]) -> Profile:
    whole = max(profile.sms for profile in profiles)
    sms = math.ceil(want.sm_percent * whole / 100)
    fitting = [profile for profile in profiles if profile.memory_bytes >= want.memory_bytes and profile.sms >= sms]
    if not fitting:
        most = max(profile.memory_bytes for profile in profiles)
        raise InvalidValue(
            f"needs {format_bytes(want.memory_bytes)}, the largest instance has {format_bytes(most)}", key="function", value=want.function
        )
    return min(fitting, key=lambda profile: (profile.memory_slices, profile.sms, profile.id))


_Pattern = tuple[tuple[int, int], ...]
"""One GPU cut up: (profile, first memory slice) of each instance."""


def _patterns(profiles: tuple[Profile, ...]) -> dict[tuple[tuple[int, int], ...], _Pattern]:
    """Every set of profiles that one GPU holds, as (profile, count), with one way to place it. There are some dozens."""
    found: dict[tuple[tuple[int, int], ...], _Pattern] = {}
    for pattern in _placed(profiles, 0, 0):
        found.setdefault(tuple(sorted(Counter(profile for profile, _ in pattern).items())), pattern)
    return found


def _placed(profiles: tuple[Profile, ...], start: int, sms: int) -> Iterator[_Pattern]:
    """All ways to fill the memory slices from `start` on, none of which gives out more SMs than the whole GPU has."""
    yield ()
    whole = max(profile.sms for profile in profiles)
    for profile in profiles:
        for place in profile.places:
            if place >= start and sms + profile.sms <= whole:
                for rest in _placed(profiles, place + profile.memory_slices, sms + profile.sms):
                    yield ((profile.id, place), *rest)


def _covering(wanted: tuple[tuple[int, int], ...], patterns: dict[tuple[tuple[int, int], ...], _Pattern]) -> list[_Pattern]:
    """The fewest GPUs whose instances are at least those that are wanted, (profile, count) each."""
    full = [
        (dict(counts), pattern) for counts, pattern in patterns.items() if not any(_within(counts, other) for other in patterns if other != counts)
    ]

    @cache
    def best(left: tuple[tuple[int, int], ...]) -> tuple[_Pattern, ...]:
        if not left:
            return ()
        # Some GPU holds the first of those that are left: that GPU is taken now.
        first, found = left[0][0], {}
        for held, pattern in full:
            if first in held:
                found[tuple((profile, count - held.get(profile, 0)) for profile, count in left if count > held.get(profile, 0))] = pattern
        return min(((pattern, *best(rest)) for rest, pattern in found.items()), key=len)

    return list(best(wanted))


def _within(less: tuple[tuple[int, int], ...], more: tuple[tuple[int, int], ...]) -> bool:
    most = dict(more)
    return all(count <= most.get(profile, 0) for profile, count in less)
