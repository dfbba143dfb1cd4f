"""What the driver says of a GPU's busy time, by a driver that is not there."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace

import pynvml
import pytest

from benchmarks.gpu_parts import busy
from benchmarks.node_parts.node import running
from contracts.errors import Unavailable
from contracts.units import MIB
from nodeagent.shell.nvml import Nvml
from tests.nodeagent.fake_nvml import FakeGpu, FakeNvml

SECOND_US = 1_000_000


class Clock:
    """A time that only the test moves; stands where the module `time` stands."""

    def __init__(self):
        self.now_s = 100.0

    def monotonic(self):
        return self.now_s


class Counting(FakeNvml):
    """A GPU with a counter of busy seconds that a GPM sample shows, as long as it is one that the device still knows."""

    def __init__(self, clock, *, shown=True):
        super().__init__(FakeGpu(0))
        self.clock, self.shown, self.busy_s, self.samples = clock, shown, 0.0, {}

    def run(self, seconds, part):
        self.clock.now_s += seconds
        self.busy_s += seconds * part

    def nvmlGpmQueryDeviceSupport(self, gpu):
        return SimpleNamespace(isSupportedDevice=1)

    def nvmlGpmSampleAlloc(self):
        sample = pynvml.c_nvmlGpmSample_t()
        self.samples[id(sample)] = (sample, None)
        return sample

    def nvmlGpmSampleGet(self, gpu, sample):
        if not self.shown:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NO_PERMISSION)
        self.samples[id(sample)] = (sample, (self.clock.now_s, self.busy_s))

    def nvmlGpmSampleFree(self, sample):
        del self.samples[id(sample)]

    def nvmlGpmMetricsGet(self, question):
        assert (question.version, question.numMetrics) == (pynvml.NVML_GPM_METRICS_GET_VERSION, 1)
        assert question.metrics[0].metricId == pynvml.NVML_GPM_METRIC_GRAPHICS_UTIL
        taken = [at for _, at in self.samples.values() if at is not None]
        (before_s, before), (after_s, after) = taken[-2:]
        question.metrics[0].nvmlReturn = pynvml.NVML_SUCCESS
        question.metrics[0].value = 100 * (after - before) / (after_s - before_s)


class Sampling(FakeNvml):
    """A driver that keeps samples and gives those that are newer than a time; like the real one it has an error for "none"."""

    def __init__(self, *samples):
        super().__init__(FakeGpu(0))
        self.samples = list(samples)

    def nvmlDeviceGetSamples(self, gpu, kind, after_us):
        assert kind == pynvml.NVML_GPU_UTILIZATION_SAMPLES
        found = [SimpleNamespace(timeStamp=at_us, sampleValue=SimpleNamespace(uiVal=percent)) for at_us, percent in self.samples if at_us > after_us]
        if not found:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return 1, found


class Ticking(Sampling):
    """A driver that has a new sample whenever it is asked: busy all the time."""

    def nvmlDeviceGetSamples(self, gpu, kind, after_us):
        self.samples = [(time.monotonic_ns() // 1000, 100)]
        return super().nvmlDeviceGetSamples(gpu, kind, after_us)


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(busy, "time", clock)
    return clock


def observing(library):
    nvml = Nvml(library)
    return busy.observe(nvml, nvml.handle(0))


def test_counters_give_the_seconds_between_their_samples(clock):
    library = Counting(clock)
    library.run(5, part=0.5)  # before anybody looks
    observer = observing(library)
    assert observer.by == "GPM"
    for seconds, part in ((2.0, 0.75), (0.5, 1.0), (1.0, 0.0)):
        library.run(seconds, part)
        observer.tick()
    assert observer.busy_s == pytest.approx(2.0)
    assert len(library.samples) == 1  # the others were given back


def test_counters_that_give_no_answer_are_an_error(clock):
    library = Counting(clock)
    observer = observing(library)
    library.run(1, part=1.0)

    def refuse(question):
        question.metrics[0].nvmlReturn = pynvml.NVML_ERROR_NOT_SUPPORTED

    library.nvmlGpmMetricsGet = refuse
    with pytest.raises(Unavailable, match="no utilisation"):
        observer.tick()


def test_samples_count_the_time_since_the_one_before():
    library = Sampling((3 * SECOND_US, 90))
    observer = observing(library)
    assert (observer.by, observer.busy_s) == ("samples", 0.0)
    observer.tick()
    assert observer.busy_s == 0.0
    library.samples += [(4 * SECOND_US, 50), (6 * SECOND_US, 100)]
    observer.tick()
    observer.tick()
    assert observer.busy_s == pytest.approx(2.5)


def test_counters_that_may_not_be_read_give_way_to_samples(clock):
    library = Counting(clock, shown=False)
    library.nvmlDeviceGetSamples = Sampling((SECOND_US, 1)).nvmlDeviceGetSamples
    assert observing(library).by == "samples"


def test_a_device_without_either_is_said_to_have_neither():
    with pytest.raises(Unavailable, match="no samples"):
        observing(FakeNvml(FakeGpu(0)))


def test_the_error_is_that_of_what_was_charged():
    assert busy.Busy(charged_s=10.3, busy_s=10.0, span_s=12.0, by="GPM").error_percent == pytest.approx(3.0)
    assert busy.Busy(charged_s=9.9, busy_s=10.0, span_s=12.0, by="GPM").error_percent == pytest.approx(-1.0)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_span_has_the_charges_of_all_functions_and_the_drivers_view_of_them():
    async def measured():
        async with running(64 * MIB) as node:
            return await busy.measure(node, Nvml(Ticking()), 0, ("mlp?seed=1", "mlp?seed=2"), seconds=4)

    found = asyncio.run(measured())
    assert 0 < found.charged_s <= found.span_s  # one lane, so never more than the time
    assert found.busy_s == pytest.approx(found.span_s, rel=0.5)
    assert found.by == "samples"
