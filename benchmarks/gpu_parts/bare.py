"""`python -m benchmarks.gpu_parts.bare SOURCE...`: what a GPU does with these models without Sluice, as JSON: the yardsticks of swaps and graphs.

A model that fails says why and is left out.

Of each model, in ms: a warm run, eager and as a CUDA graph, and three ways to a first answer from host memory: `model.to("cuda")` and a run; one
synchronous copy from pinned memory and a run; copies tensor by tensor on a stream of their own, each layer waiting on the host for its own.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from contracts.functions import ModelFormat, ModelRef
from models import catalogue, networks
from models.samples import sample_inputs

_REPEATS = 7
TOKENS = 128


def measure(source: str, device: str) -> dict[str, float]:
    """One model; on a CPU, where nothing is pinned and there are no graphs, only that the code runs is of interest."""
    config = catalogue.parse(source).config
    module = networks.construct(config).to_empty(device=device)
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                tensor.normal_(0, 0.02)
    inputs = [torch.from_numpy(array).to(device) for array in _inputs(source).values()]
    plain = {name: tensor.cpu() for name, tensor in module.state_dict().items()}
    host = {name: _pin(tensor, device) for name, tensor in plain.items()}
    found = {"bytes": float(sum(tensor.nbytes for tensor in host.values()))}
    with torch.inference_mode():
        found["warm_ms"] = _ms(lambda: module(*inputs), device)
        found["graph_ms"] = _graph_ms(module, inputs, device)
        found["to_device_ms"] = _ms(lambda: _load_new(module, plain, inputs, device), device)
        found["pinned_ms"] = _ms(lambda: _copy_all(module, host, inputs), device)
        found["host_waits_ms"] = _ms(lambda: _pipelined(module, host, inputs, device), device)
    return found


def _inputs(source: str) -> dict[str, Any]:
    part = sample_inputs(ModelRef(ModelFormat.CATALOG, source), 1, seed=1)
    return {name: np.resize(array, (1, TOKENS)) if array.dtype == np.int64 else array for name, array in part.items()}


def _pin(tensor: torch.Tensor, device: str) -> torch.Tensor:
    return tensor.pin_memory() if device == "cuda" else tensor


def _load_new(module: torch.nn.Module, host: dict[str, torch.Tensor], inputs: list[torch.Tensor], device: str) -> None:
    """As `model.to` does it: new memory, from pageable memory, tensor by tensor."""
    kept = [tensor.to(device, copy=True) for tensor in host.values()]
    module(*inputs)
    del kept


def _copy_all(module: torch.nn.Module, host: dict[str, torch.Tensor], inputs: list[torch.Tensor]) -> None:
    for name, tensor in module.state_dict().items():
        tensor.copy_(host[name], non_blocking=False)
    module(*inputs)


def _pipelined(module: torch.nn.Module, host: dict[str, torch.Tensor], inputs: list[torch.Tensor], device: str) -> None:
    if device != "cuda":
        _copy_all(module, host, inputs)
        return
    copies, events = torch.cuda.Stream(), {}
    handles = []
    with torch.cuda.stream(copies):
        for name, child in module.named_modules():
            own = [*child.named_parameters(recurse=False), *child.named_buffers(recurse=False)]
            for key, tensor in own:
                tensor.copy_(host[f"{name}.{key}" if name else key], non_blocking=True)
            if own:
                events[child] = torch.cuda.Event()
                events[child].record(copies)
    for child, event in events.items():
        handles.append(child.register_forward_pre_hook(lambda *_, event=event: event.synchronize()))
    module(*inputs)
    for handle in handles:
        handle.remove()


def _graph_ms(module: torch.nn.Module, inputs: list[torch.Tensor], device: str) -> float:
    if device != "cuda":
        return 0.0
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        module(*inputs)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            module(*inputs)
    return _ms(graph.replay, device)


def _ms(run: Callable[[], object], device: str) -> float:
    """The median of a few, each waited for."""
    times = []
    for _ in range(1 + _REPEATS):
        begun = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - begun))
    return float(np.median(times[1:]))


if __name__ == "__main__":
    where = "cuda" if torch.cuda.is_available() else "cpu"
    found = {}
    for argument in sys.argv[1:]:
        try:
            found[argument] = measure(argument, where)
        except Exception:
            traceback.print_exc()
    print(json.dumps(found))
