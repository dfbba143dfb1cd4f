"""The order in which a run first needs its weights, and the gates: how much must have arrived before each part of it.

Owns the recording of one run and the arithmetic of the layout. The order is right by construction for straight-line programs: a weight belongs to
the last gate that the run passed before any operator first touched it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from contracts.artifact import ALIGNMENT, Gate, TensorEntry
from contracts.errors import InvalidArtifact


class Layout(NamedTuple):
    """Where each weight lies. The same for every model of a program."""

    tensors: tuple[TensorEntry, ...]
    gates: tuple[Gate, ...]
    total_bytes: int
    run_ns: int


class _Recorder(TorchDispatchMode):
    """Notes which weights operators touch, as (name) in order of first use; `storages` maps a storage to the weights in it."""

    def __init__(self, storages: Mapping[int, list[str]], touched: Callable[[str], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._storages = storages
        self._touched = touched

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        for leaf in pytree.tree_iter((args, kwargs or {})):
            if isinstance(leaf, Tensor):
                for name in self._storages.get(leaf.untyped_storage().data_ptr(), ()):
                    self._touched(name)
        return func(*args, **(kwargs or {}))


def record(module: nn.Module, weights: Mapping[str, Tensor], run: Callable[[], object], opaque: bool) -> Layout:
    """The layout of `weights` from runs of `run`, which calls `module` once each time.

    `opaque`: the module hides its operators (TorchScript); everything is needed at its entry. InvalidArtifact when a run changes a weight.
    """
    versions = {name: tensor._version for name, tensor in weights.items()}
    windows = [("", list(weights))] if opaque else _first_uses(module, weights, run)
    order = [name for _, names in windows for name in names]
    order += [name for name in weights if name not in set(order)]
    entries, ends, end = [], {}, 0
    for name in order:
        tensor = weights[name]
        offset = -(-end // ALIGNMENT) * ALIGNMENT
        end = offset + tensor.nbytes
        ends[name] = end
        entries.append(TensorEntry(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), offset, tensor.nbytes))
    gates, need = [], 0
    for path, names in windows:
        need = max([need, *(ends[name] for name in names)])
        gates.append(Gate(path, need))
    run_ns = _time(run)
    changed = [name for name, tensor in weights.items() if tensor._version != versions[name]]
    if changed:
        raise InvalidArtifact("is changed by a run; weights are shared and must stay as they are", key="weight", value=changed[0])
    return Layout(tuple(entries), tuple(gates), max(ALIGNMENT, -(-end // ALIGNMENT) * ALIGNMENT), run_ns)


def _first_uses(module: nn.Module, weights: Mapping[str, Tensor], run: Callable[[], object]) -> list[tuple[str, list[str]]]:
    """(submodule, the weights first used after its first entry and before the next one's), without submodules that would need nothing more.

    The model itself comes first, always.
    """
    windows: list[tuple[str, list[str]]] = [("", [])]
    storages: dict[int, list[str]] = {}
    for name, tensor in weights.items():
        storages.setdefault(tensor.untyped_storage().data_ptr(), []).append(name)
    entered: set[str] = set()
    used: set[str] = set()

    def enter(path: str) -> None:
        if path not in entered:
            entered.add(path)
            windows.append((path, []))

    def touch(name: str) -> None:
        if name not in used:
            used.add(name)
            windows[-1][1].append(name)

    with _Hooked(module, [path for path, _ in module.named_modules() if path], enter), _Recorder(storages, touch):
        run()
    return [(path, names) for path, names in windows if names or not path]


def _time(run: Callable[[], object]) -> int:
    """How long a warm run takes, in ns."""
    run()
    start = time.perf_counter_ns()
    run()
    return time.perf_counter_ns() - start


class _Hooked:
    """While it is entered, calls `enter(path)` before each call of the submodules at `paths`."""

    def __init__(self, module: nn.Module, paths: Iterable[str], enter: Callable[[str], object]) -> None:
        self._targets = [(path, module.get_submodule(path)) for path in paths]
        self._enter = enter
        self._handles: list[Any] = []

    def __enter__(self) -> None:
        for path, submodule in self._targets:
            self._handles.append(submodule.register_forward_pre_hook(lambda _module, _args, path=path: self._note(path)))

    def _note(self, path: str) -> None:
        self._enter(path)

    def __exit__(self, *exc: object) -> None:
        for handle in self._handles:
            handle.remove()
