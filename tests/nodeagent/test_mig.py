"""MIG: the planner against exhaustive truths, and the way from a plan to instances over a driver that keeps NVML's rules."""

from __future__ import annotations

from collections import defaultdict

import pynvml
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contracts.errors import InvalidValue, Unavailable
from contracts.units import GIB, MIB
from nodeagent.mig import Profile, Want, plan
from nodeagent.shell import mig
from nodeagent.shell.nvml import Nvml
from tests.nodeagent.fake_nvml import H100, FakeGpu, FakeNvml

PROFILES = tuple(
    Profile(id_, name.removeprefix("MIG "), memory * MIB, sms, size, places)
    for id_, name, sms, memory, size, places in H100.values()
    if "+" not in name
)


@given(st.lists(st.tuples(st.integers(1, 79), st.integers(1, 100)), min_size=1, max_size=12))
@settings(deadline=None)
def test_every_function_has_an_instance_that_is_large_enough_at_a_place_that_exists(asked: list[tuple[int, int]]) -> None:
    wants = {f"f{number}": Want(f"f{number}", gib * GIB, sm) for number, (gib, sm) in enumerate(asked)}
    planned = plan(tuple(wants.values()), PROFILES, len(wants))
    assert sorted(instance.function for instance in planned) == sorted(wants)
    slices = defaultdict(list)
    sms = defaultdict(int)
    for instance in planned:
        profile, want = instance.profile, wants[instance.function]
        assert profile.memory_bytes >= want.memory_bytes
        assert profile.sms * 100 >= want.sm_percent * 132
        assert instance.start in profile.places
        slices[instance.gpu] += range(instance.start, instance.start + profile.memory_slices)
        sms[instance.gpu] += profile.sms
    assert all(len(taken) == len(set(taken)) and max(taken) < 8 for taken in slices.values())
    assert max(sms.values()) <= 132
    assert sorted(slices) == list(range(len(slices)))


@pytest.mark.parametrize(
    ("gib", "gpus"),
    [
        ([5] * 7, 1),
        ([5] * 8, 2),
        ([18] * 4, 1),
        ([35, 35], 1),
        ([35, 18, 18], 1),
        ([35, 18, 5, 5], 1),
        ([35, 35, 5], 2),
        ([70, 5], 2),
        ([18, 18, 18, 5], 1),
    ],
)
def test_as_few_gpus_as_there_can_be(gib: list[int], gpus: int) -> None:
    planned = plan([Want(f"f{number}", size * GIB, 1) for number, size in enumerate(gib)], PROFILES, 8)
    assert max(instance.gpu for instance in planned) + 1 == gpus


def test_a_function_that_fits_nowhere_is_named() -> None:
    with pytest.raises(InvalidValue, match=r"needs 100(\.0)? GiB"):
        plan([Want("big", 100 * GIB, 1)], PROFILES, 1)


def test_how_many_gpus_it_would_take_is_said() -> None:
    with pytest.raises(InvalidValue, match="need 2 GPUs"):
        plan([Want("a", 70 * GIB, 1), Want("b", 70 * GIB, 1)], PROFILES, 1)


def test_what_the_driver_offers_is_what_the_planner_plans_with() -> None:
    with Nvml(FakeNvml(FakeGpu(0))) as nvml:
        assert sorted(mig.profiles(nvml, 0), key=lambda profile: profile.id) == sorted(PROFILES, key=lambda profile: profile.id)


def test_a_gpu_without_mig_mode_has_no_profiles() -> None:
    with Nvml(FakeNvml(FakeGpu(0, mig=False))) as nvml:
        assert mig.profiles(nvml, 0) == ()
        assert mig.existing(nvml, 0) == ()


@given(st.lists(st.lists(st.integers(1, 39), min_size=1, max_size=4), min_size=2, max_size=4))
@settings(deadline=None, max_examples=30)
def test_one_plan_after_another_is_reached_and_reaching_it_again_takes_no_step(plans: list[list[int]]) -> None:
    library = FakeNvml(FakeGpu(0), FakeGpu(1), FakeGpu(2), FakeGpu(3))
    with Nvml(library) as nvml:
        for sizes in plans:
            planned = plan([Want(f"f{number}", gib * GIB, 1) for number, gib in enumerate(sizes)], mig.profiles(nvml, 0), 4)
            there = [instance for gpu in range(4) for instance in mig.existing(nvml, gpu)]
            assert len(list(mig.apply(nvml, mig.steps(planned, there)))) == len(mig.steps(planned, there))
            there = [instance for gpu in range(4) for instance in mig.existing(nvml, gpu)]
            assert mig.steps(planned, there) == ()
            touched = {instance.gpu for instance in planned}
            found = sorted((one.gpu, one.start, one.profile) for one in there if one.gpu in touched)
            assert found == sorted((one.gpu, one.start, one.profile.name) for one in planned)
            assert all(one.uuid for one in there)


def test_a_gpu_in_use_is_left_as_it_is() -> None:
    gpu = FakeGpu(0, processes=[4711])
    with Nvml(FakeNvml(gpu)) as nvml:
        planned = plan([Want("a", GIB, 1)], mig.profiles(nvml, 0), 1)
        with pytest.raises(Unavailable, match="in use by process 4711"):
            list(mig.apply(nvml, mig.steps(planned, ())))
    assert not gpu.instances


def test_an_instance_in_use_keeps_its_whole_gpu_as_it_is() -> None:
    gpu = FakeGpu(0)
    with Nvml(FakeNvml(gpu)) as nvml:
        list(mig.apply(nvml, mig.steps(plan([Want("a", GIB, 1)], mig.profiles(nvml, 0), 1), ())))
        gpu.instances[0].processes.append(12)
        other = plan([Want("b", 35 * GIB, 1)], mig.profiles(nvml, 0), 1)
        with pytest.raises(Unavailable, match="in use by process 12"):
            list(mig.apply(nvml, mig.steps(other, mig.existing(nvml, 0))))
        assert [one.profile for one in mig.existing(nvml, 0)] == ["1g.10gb"]


def test_what_the_driver_refuses_is_said_with_the_step() -> None:
    library = FakeNvml(FakeGpu(0))
    with Nvml(library) as nvml:
        steps = (mig.Step("make", 0, "4g.40gb", 0, "a"), mig.Step("make", 0, "7g.80gb", 0, "b"))
        taken = mig.apply(nvml, steps)
        assert next(taken) == steps[0]
        with pytest.raises(Unavailable, match=r"GPU 0: cannot make 7g\.80gb at slice 0"):
            next(taken)


def test_the_facts_of_each_gpu() -> None:
    with Nvml(FakeNvml(FakeGpu(0), FakeGpu(1, mig=False), FakeGpu(2))) as nvml:
        assert nvml.driver().version == "570.86.15"
        assert nvml.driver().cuda == (12, 8)
        first, second, third = nvml.gpus()
        assert (first.mig, second.mig) == (True, False)
        assert (first.peers, second.peers, third.peers) == ((1,), (0,), ())
        assert first.compute_mode == "default"
        # What this driver does not give is unknown, not zero.
        assert first.pcie_generation is None


def test_what_a_gpu_does_now() -> None:
    with Nvml(FakeNvml(FakeGpu(0, processes=[3, 1]))) as nvml:
        seen = nvml.telemetry(nvml.handle(0))
    assert (seen.busy_percent, seen.memory_used_bytes) == (37, 512 * MIB)
    assert (seen.pcie_rx_bytes_per_s, seen.pcie_tx_bytes_per_s) == (1_024_000, 2_048_000)
    assert seen.throttled == ("power",)
    assert seen.processes == (1, 3)
    assert seen.uncorrected_errors is None


def test_no_driver_is_said() -> None:
    with pytest.raises(Unavailable, match="no NVIDIA driver"):
        Nvml(FakeNvml(driver=False))


def test_the_fake_has_the_real_packages_names() -> None:
    faked = [name for name in vars(FakeNvml) if name.startswith("nvml")]
    assert all(callable(getattr(pynvml, name)) for name in faked)
