"""Seeded weights: a seed names its values, whoever makes them and with however many threads."""

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn

from models import seeded, threads


def made(seed: int) -> dict[str, torch.Tensor]:
    """A matrix of more than one block, a shift, a scale, and a counter."""
    with torch.device("meta"):
        module = nn.Sequential(nn.Linear(1500, 1500), nn.BatchNorm1d(1500))
    seeded.fill(module, seed)
    return {name: tensor.detach() for name, tensor in module.state_dict().items()}


def test_any_number_of_threads_makes_the_same_values(monkeypatch):
    alone = made(7)
    with ThreadPoolExecutor(5) as pool:
        monkeypatch.setattr(threads, "_pool", lambda: pool)
        together = made(7)
    assert all(torch.equal(alone[name], together[name]) for name in alone)


def test_another_seed_and_another_block_are_other_values():
    one, other = made(7), made(8)
    assert not torch.equal(one["0.weight"], other["0.weight"])
    flat = one["0.weight"].flatten()
    block = 1 << 20
    assert not torch.equal(flat[: len(flat) - block], flat[block:])
    assert not torch.equal(one["0.bias"], one["1.bias"])


def test_values_are_kind_to_what_flows_through():
    values = made(7)
    assert abs(float(values["0.weight"].var()) * 1500 - 1) < 0.01
    assert abs(float(values["1.weight"].mean()) - 1) < 0.02
    assert float(values["1.running_var"].min()) > 0
    assert int(values["1.num_batches_tracked"]) == 0
