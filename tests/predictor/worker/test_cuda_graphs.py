"""Graphs hold addresses: recorded off the way of requests, replayed at their own place, dropped when the function is run anywhere else."""

from __future__ import annotations

import gc
import random
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.predictor.worker.fake_cuda import PATIENCE_S, Broken, FakeCuda
from tests.predictor.worker.rig import Rig, answer, reader


class Bench:
    """Functions that lie where they are put, without copies."""

    def __init__(self, names: str, same_program: bool = False) -> None:
        chance = random.Random(1)
        self.driver = FakeCuda()
        self.contents = {name: chance.randbytes(300) for name in names}
        self.functions = {name: reader(self.driver, name, [100, 200], content) for name, content in self.contents.items()}
        if same_program:
            first = self.functions[names[0]]
            for function in self.functions.values():
                function.program = first.program
        self.rig = Rig(self.driver, list(self.functions.values()))

    def answers(self, name: str, offset: int, x: int, preemptible: bool = False) -> bool:
        """Puts a function's weights somewhere and runs it; whether the answer is right."""
        self.rig.device.slab[offset : offset + 300].copy_(self.functions[name].weights)
        done, output = self.rig.run(self.functions[name], offset, x, preemptible=preemptible)
        return done.error is None and output == answer(self.contents[name], x)

    def settle(self) -> None:
        """An idle moment."""
        while self.rig.device.has_idle_work:
            self.rig.device.work_idly()


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench("ab", same_program=True)
    yield made
    made.rig.close()


def test_a_shape_that_comes_again_is_recorded_in_an_idle_moment_and_replayed_from_then_on(bench: Bench) -> None:
    assert bench.answers("a", 0, 1)
    assert not bench.rig.device.has_idle_work, "once may be the only time"
    assert bench.answers("a", 0, 2)
    assert bench.rig.device.has_idle_work
    assert not bench.driver.graphs, "nothing is recorded on the way of a request"
    bench.settle()
    (graph,) = bench.driver.graphs
    for x in range(3, 8):
        assert bench.answers("a", 0, x)
    assert graph.replayed == 5


def test_another_function_of_the_same_program_in_between_does_not_reach_the_graph(bench: Bench) -> None:
    for turn in range(3):
        assert bench.answers("a", 0, turn)
        assert bench.answers("b", 1024, turn)
        bench.settle()
    assert sorted(graph.replayed for graph in bench.driver.graphs) == [1, 1]
    assert bench.answers("b", 1024, 9)
    assert bench.answers("a", 0, 9)


def test_a_function_that_comes_back_to_its_place_is_replayed_and_elsewhere_its_graph_is_dropped(bench: Bench) -> None:
    for x in (1, 2):
        bench.answers("a", 0, x)
    bench.settle()
    bench.rig.scribble(0, 1024, 5)
    assert bench.answers("a", 0, 3)
    (graph,) = bench.driver.graphs
    assert graph.replayed == 1
    assert bench.answers("a", 2048, 4)
    assert graph.dropped
    assert bench.answers("a", 2048, 5)
    bench.settle()
    assert bench.answers("a", 2048, 6)
    assert bench.driver.graphs[1].replayed == 1
    assert bench.answers("a", 0, 7)


def test_a_batch_that_may_pause_or_whose_weights_still_come_is_never_replayed(bench: Bench) -> None:
    for x in (1, 2):
        bench.answers("a", 0, x)
    bench.settle()
    assert bench.answers("a", 0, 3, preemptible=True)
    launched = bench.driver.launched
    with ThreadPoolExecutor(1) as pool:
        with bench.driver.halted():
            bench.rig.begin(1, bench.functions["a"], 0)
            bench.rig.grant(1, 300)
            batch = pool.submit(bench.rig.run, bench.functions["a"], 0, 4, copy=1)
            bench.driver.until(lambda: bench.driver.launched == launched + 2)
        assert batch.result(PATIENCE_S)[1] == answer(bench.contents["a"], 4)
    assert bench.driver.graphs[0].replayed == 0


def test_a_cold_batch_is_replayed_behind_its_copy_where_the_host_would_take_longer_to_issue_it(bench: Bench) -> None:
    function, device = bench.functions["a"], bench.rig.device
    for x in (1, 2):
        bench.answers("a", 0, x)
    bench.settle()
    bench.answers("a", 0, 3)
    (graph,) = bench.driver.graphs
    recorded = device.graphs._recorded[next(iter(device.graphs._recorded))]
    assert recorded.eager_ns == recorded.replay_ns > 0
    for copy, (eager_ns, replays) in enumerate(((recorded.replay_ns, 1), (10**12, 2), (recorded.replay_ns, 2)), start=1):
        recorded.eager_ns = eager_ns
        bench.rig.scribble(0, 300, copy)
        launched = bench.driver.launched
        with ThreadPoolExecutor(1) as pool:
            with bench.driver.halted():
                bench.rig.begin(copy, function, 0)
                for until in (100, 300):
                    bench.rig.grant(copy, until)
                batch = pool.submit(bench.rig.run, function, 0, copy, copy=copy)
                bench.driver.until(lambda launched=launched: bench.driver.launched == launched + 2)
            done, output = batch.result(PATIENCE_S)
        assert (done.error, output) == (None, answer(bench.contents["a"], copy))
        bench.rig.until_copied(copy, 300)
        bench.driver.until(lambda: device._bytes_per_s.get("", 0) > 0)
        assert graph.replayed == replays


def test_a_detached_function_loses_its_graphs_and_is_not_kept_by_what_was_wanted(bench: Bench) -> None:
    for x in (1, 2):
        bench.answers("a", 0, x)
        bench.answers("b", 1024, x)
    bench.rig.device.work_idly()
    (graph,) = bench.driver.graphs
    held = {name: weakref.ref(bench.functions.pop(name)) for name in "ab"}
    for name in held:
        bench.rig.functions.detach(name)
    for work in (bench.rig.functions.prepare, bench.rig.functions.pin):
        threading.Thread(target=work, daemon=True).start()
    deadline = time.monotonic() + PATIENCE_S
    while any(reference() for reference in held.values()):
        assert time.monotonic() < deadline, "something still holds them"
        gc.collect()
    bench.settle()
    assert graph.dropped
    assert len(bench.driver.graphs) == 1


def test_few_graphs_are_kept_those_used_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("predictor.worker.devices.graphs._MOST_GRAPHS", 2)
    bench = Bench("abc")
    try:
        for name in "abc":
            for x in (1, 2):
                bench.answers(name, 1024 * "abc".index(name), x)
            bench.settle()
            bench.answers("a", 0, 3)
        first, second, third = bench.driver.graphs
        assert (first.dropped, second.dropped, third.dropped) == (False, True, False)
        assert first.replayed == 3
    finally:
        bench.rig.close()


def test_a_program_that_cannot_be_recorded_stays_eager_and_one_that_breaks_the_device_ends_the_lane(bench: Bench, capsys) -> None:
    def refuse(run: object) -> None:
        raise RuntimeError("called a synchronizing CUDA operation")

    bench.driver.capture = refuse  # type: ignore[method-assign]
    for x in range(5):
        assert bench.answers("a", 0, x)
        bench.settle()
    assert not bench.driver.graphs
    assert capsys.readouterr().err.count("a runs without a CUDA graph") == 1

    def destroy(run: object) -> None:
        raise Broken("CUDA error: an illegal memory access was encountered")

    other = Bench("a")
    try:
        other.driver.capture = destroy  # type: ignore[method-assign]
        for x in (1, 2):
            other.answers("a", 0, x)
        with pytest.raises(Broken):
            other.settle()
    finally:
        other.rig.close()


def test_graphs_make_room_for_a_batch_that_finds_too_little_memory(bench: Bench) -> None:
    for x in (1, 2):
        bench.answers("a", 0, x)
    bench.settle()
    program = bench.functions["b"].program
    assert program is not None
    module, forward, fails = program.execute.module, program.execute.module.forward, [1]

    def short(x: torch.Tensor) -> torch.Tensor:
        if fails:
            fails.pop()
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(x)

    module.forward = short
    assert bench.answers("b", 1024, 3)
    assert bench.driver.graphs[0].dropped
    fails.append(1)
    done, _ = bench.rig.run(bench.functions["b"], 1024, 4)
    assert done.error is not None
    assert "out of memory" in done.error[1]
    assert bench.answers("b", 1024, 5)
