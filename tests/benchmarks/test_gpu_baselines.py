"""The plain process beside Sluice, on the CPU: whole models kept or not, references, and that a wrong answer is seen."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from benchmarks.gpu_parts.answers import SAME, WRONG, compare
from benchmarks.gpu_parts.baselines import KEEP_ALIVE, ON_DEMAND, Baselines, Cache
from benchmarks.gpu_parts.fleet import Kind, fleet, inputs, weight_bytes
from contracts.errors import Unavailable
from contracts.functions import Slo
from contracts.units import MIB, MS, S
from models.load import load
from models.store import ref_name
from models.store_writer import remember, write

SOURCE = "mlp?width=64&seed={}"
KIND = Kind("mlp", SOURCE, Slo(60 * S, 98.0), weight_bytes(SOURCE.format(1)))
FLEET = fleet([KIND], (5,))


@pytest.fixture(scope="module")
def digests(tmp_path_factory):
    """A host store with the fleet, and each function's digest."""
    store = tmp_path_factory.mktemp("store")
    found = [write(load(function.model), store, 64 * MIB).digest for function in FLEET.functions]
    for function, digest in zip(FLEET.functions, found, strict=True):
        remember(store, ref_name(function.model), digest)
    return store, found


@pytest.fixture
def plain(digests):
    threads = torch.get_num_threads()
    yield Baselines(digests[0], FLEET, "cpu:0")
    torch.set_num_threads(threads)


def run(plain, policy, capacity=2, functions=5):
    return plain.point(policy, functions, rate=600, span_s=1, capacity_bytes=capacity * KIND.nbytes, seed=3)


def test_references_are_the_plain_models_answers(plain):
    references = plain.refer()
    for function, found in zip(FLEET.functions, references, strict=True):
        for part, outputs in zip(inputs(KIND), found, strict=True):
            expected = load(function.model).run({name: torch.from_numpy(array) for name, array in part.items()})
            assert compare(outputs, {name: tensor.numpy() for name, tensor in expected.items()}) == SAME
    assert compare(references[0][0], references[1][0]) == WRONG
    assert compare(references[0][0], references[0][1]) == WRONG


def test_a_store_with_other_weights_is_noticed(digests, plain):
    store, found = digests
    first = ref_name(FLEET.functions[0].model)
    remember(store, first, found[1])
    try:
        with pytest.raises(Unavailable, match="not those of its seed"):
            Baselines(store, FLEET, "cpu:0").refer()
    finally:
        remember(store, first, found[0])


def test_the_least_recently_used_model_gives_way_but_never_one_in_use(plain):
    cache = Cache(plain._device, plain._models, 2 * KIND.nbytes, keep=True)
    assert [cache.fetch(number, None) for number in (0, 1, 0)] == [True, True, False]
    assert cache.fetch(2, in_use=None)  # 1 goes
    assert not cache.fetch(0, None)
    assert cache.fetch(1, in_use=2)  # 0 goes, though 2 was used longer ago
    assert not cache.fetch(2, None)
    assert cache.fetch(0, None)


def test_all_models_stay_where_there_is_room_and_none_on_demand(plain):
    plain.refer()
    kept, loaded = run(plain, KEEP_ALIVE, capacity=5), run(plain, ON_DEMAND)
    assert [each.request for each in kept.served] == [each.request for each in loaded.served]
    assert len(kept.served) > 20
    assert {each.cold for each in kept.served} == {False}
    assert {each.cold for each in loaded.served} == {True}
    assert {each.verdict for each in kept.served + loaded.served} == {SAME}
    assert (kept.out, kept.broken_off) == (0, False)


def test_a_wrong_answer_is_counted(plain):
    references = plain.refer()
    references[0][0] = references[1][0]
    verdicts = {(each.request.function, each.request.input): each.verdict for each in run(plain, KEEP_ALIVE).served}
    assert {key for key, verdict in verdicts.items() if verdict == WRONG} == {(0, 0)}


def test_a_point_is_broken_off_once_too_many_are_late(digests, plain):
    hurried = fleet([dataclasses.replace(KIND, slo=Slo(MS // 1000, 98.0))], (5,))
    plain = Baselines(digests[0], hurried, "cpu:0")
    plain.refer()
    point = run(plain, KEEP_ALIVE)
    assert (point.out, point.broken_off, len(point.served)) == (1, True, 1)
