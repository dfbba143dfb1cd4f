"""What a CUDA device counts, stages, pins and proves."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from contracts.errors import ExecutionError
from predictor.worker.devices.cuda import CudaMeter, Events, Staging
from predictor.worker.devices.proof import occupancy_ns, prove
from tests.predictor.worker.fake_cuda import SMS, WHOLE_NS, Broken, FakeCuda
from tests.predictor.worker.rig import KERNEL_NS, Rig, answer, reader


@pytest.fixture
def driver() -> Iterator[FakeCuda]:
    made = FakeCuda()
    yield made
    made.close()


STEPS = st.lists(st.tuples(st.sampled_from(["run", "stall", "pause"]), st.integers(1, 10**9)), max_size=20)


def arrive_after(driver: FakeCuda, ns: int) -> None:
    """Compute, which has nothing to do, is held for a copy that is there in `ns`."""
    issued = driver.event()
    issued.record(driver.compute)
    issued.synchronize()
    driver.put(driver.copies, lambda: setattr(driver.copies, "at_ns", driver.compute.at_ns + ns))
    arrived = driver.event()
    arrived.record(driver.copies)
    arrived.wait(driver.compute)


@given(STEPS)
def test_gpu_time_is_what_ran_since_the_last_pause_and_swap_time_all_that_stood_still(steps: list[tuple[str, int]]) -> None:
    driver = FakeCuda()
    meter = CudaMeter(Events(driver), preemptible=False)
    meter.start()
    ran = stood = 0
    for what, ns in steps:
        if what == "run":
            driver.launch(lambda: None, ns)
            ran += ns
        elif what == "stall":
            meter.stall(lambda ns=ns: arrive_after(driver, ns))
            stood += ns
        else:
            meter.stop()
            assert meter.gpu_ns == pytest.approx(ran, abs=len(steps))
            driver.launch(lambda: None, ns)
            meter.start()
            ran = 0
    meter.stop()
    meter.stop()
    driver.close()
    assert meter.gpu_ns == pytest.approx(ran, abs=len(steps))
    assert meter.swap_ns == pytest.approx(stood, abs=len(steps))


def test_a_meter_that_never_started_has_nothing_to_wait_for(driver: FakeCuda) -> None:
    meter = CudaMeter(Events(driver), preemptible=False)
    with driver.halted():
        meter.stop()
    assert (meter.gpu_ns, meter.swap_ns) == (0, 0)


def test_weights_that_are_there_before_compute_is_cost_no_time(driver: FakeCuda) -> None:
    meter = CudaMeter(Events(driver), preemptible=False)
    meter.start()
    driver.launch(lambda: None, 5_000_000)
    arrived = driver.event()
    driver.copy(torch.empty(10), torch.zeros(10), driver.copies)
    arrived.record(driver.copies)
    meter.stall(lambda: arrived.wait(driver.compute))
    driver.launch(lambda: None, 1_000_000)
    meter.stop()
    assert (meter.gpu_ns, meter.swap_ns) == (6_000_000, 0)


def test_a_wait_for_a_copy_that_is_given_up_leaves_a_meter_that_can_be_read(driver: FakeCuda) -> None:
    def give_up() -> None:
        raise ExecutionError("given up")

    meter = CudaMeter(Events(driver), preemptible=False)
    meter.start()
    with pytest.raises(ExecutionError):
        meter.stall(give_up)
    driver.launch(lambda: None, 3000)
    meter.stop()
    assert meter.gpu_ns == 3000


def test_events_are_used_again_from_batch_to_batch(driver: FakeCuda) -> None:
    events = Events(driver)
    marks = set()
    for _ in range(3):
        events.renew()
        marks |= {id(events.mark()) for _ in range(4)}
    assert len(marks) == 4


shapes = st.lists(
    st.tuples(st.sampled_from([torch.uint8, torch.bool, torch.float32, torch.int64]), st.lists(st.integers(0, 60), max_size=3)), max_size=12
)


@given(st.lists(shapes, min_size=1, max_size=3))
def test_staged_tensors_of_a_batch_never_overlap_and_keep_their_values(batches) -> None:
    driver = FakeCuda()
    staging = Staging(driver)
    for batch in batches:
        staging.renew()
        values = [torch.randint(0, 2, tuple(shape)).to(dtype) for dtype, shape in batch]
        staged = [staging.take(value).copy_(value) for value in values]
        assert all(torch.equal(*pair) and pair[0].dtype == pair[1].dtype for pair in zip(staged, values, strict=True))
        assert all(tensor.is_contiguous() for tensor in staged)
    driver.close()


def test_staging_memory_stops_growing() -> None:
    driver = FakeCuda()
    taken: list[int] = []
    pinned = driver.pinned
    driver.pinned = lambda nbytes: (taken.append(nbytes), pinned(nbytes))[1]  # type: ignore[method-assign]
    staging = Staging(driver)
    for _ in range(20):
        staging.renew()
        for _ in range(10):
            staging.take(torch.empty(1_000_000, dtype=torch.uint8))
    assert len(taken) <= 5
    assert taken == sorted(taken)
    driver.close()


@pytest.mark.parametrize(("sms", "expected"), [(SMS, 100.0), (66, 50.0), (13, 9.85)])
def test_a_lane_proves_what_it_reads_back_and_what_the_kernel_finds(sms: int, expected: float) -> None:
    driver = FakeCuda(sms=sms)
    proof = prove(driver, WHOLE_NS)
    assert proof.sms == sms
    assert proof.measured_sm_percent == pytest.approx(expected, abs=0.01)
    driver.close()


def test_a_neighbour_that_is_busy_for_a_while_does_not_make_a_lane_seem_smaller(driver: FakeCuda) -> None:
    times = itertools.chain([9, 7, 8, 6, 9, 9, 9, 2], itertools.repeat(5))
    driver.occupy = lambda: driver.launch(lambda: None, next(times) * WHOLE_NS)  # type: ignore[method-assign]
    assert occupancy_ns(driver) == 2 * WHOLE_NS


def test_weights_are_pinned_once_ready_and_unpinned_only_when_no_copy_reads_them(driver: FakeCuda) -> None:
    function = reader(driver, "f", [1000], bytes(1000))
    rig = Rig(driver, [function])
    rig.device.pin(function.weights)
    assert driver.registered == {function.weights.data_ptr()}
    unregistered_at: list[bool] = []
    unregister = driver.unregister
    driver.unregister = lambda memory: (unregistered_at.append(not driver.copies.work), unregister(memory))[1]  # type: ignore[method-assign]
    rig.begin(1, function, 0)
    rig.grant(1, 1000)
    driver.until(lambda: driver.copied == 4)
    rig.device.unpin(function.weights)
    rig.device.unpin(function.weights)
    assert unregistered_at == [True]
    assert not driver.registered


def test_memory_that_cannot_be_pinned_is_copied_all_the_same(driver: FakeCuda) -> None:
    driver.register = lambda memory: False  # type: ignore[method-assign]
    content = random.Random(1).randbytes(700)
    function = reader(driver, "f", [700], content)
    rig = Rig(driver, [function])
    rig.device.pin(function.weights)
    rig.begin(1, function, 0)
    rig.grant(1, 700)
    assert rig.run(function, 0, 5, copy=1)[1] == answer(content, 5)
    rig.device.unpin(function.weights)


def test_an_error_of_the_model_is_the_batchs_and_an_error_of_cuda_the_lanes(driver: FakeCuda) -> None:
    content = bytes(range(100))
    function = reader(driver, "f", [100], content)
    rig = Rig(driver, [function])
    rig.begin(1, function, 0)
    rig.grant(1, 100)
    rig.until_copied(1, 100)
    assert function.program is not None
    module, forward = function.program.execute.module, function.program.execute.module.forward

    def failing(failure: Exception):
        def run(x: torch.Tensor) -> torch.Tensor:
            forward(x)
            raise failure

        return run

    module.forward = failing(ValueError("no such shape"))
    done, _ = rig.run(function, 0, 1)
    assert done.error == ("ExecutionError", "ValueError: no such shape")
    assert done.gpu_ns >= KERNEL_NS, "what it used before it failed is charged"
    module.forward = forward
    assert rig.run(function, 0, 2)[1] == answer(content, 2)
    module.forward = failing(Broken("CUDA error: an illegal memory access was encountered"))
    with pytest.raises(Broken):
        rig.run(function, 0, 3)
