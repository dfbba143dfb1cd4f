"""Gates: the entries of submodules at which a run may have to wait for weights, or may pause.

Owns the hooks on one program's module. They are there only while batches need them: a resident batch that may not be paused runs the bare module.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.utils.hooks import RemovableHandle

from contracts.artifact import Gate

_WAIT_POINTS = 64

Needs = tuple[tuple[str, int], ...]
"""(submodule, bytes of the weights that must have arrived at its entry), in the order of a run."""


def needs_of(gates: Sequence[Gate], total_bytes: int) -> Needs:
    """What a run waits for at each gate: its own need, raised to the end of its group, so that a run waits at most about 64 times.

    Every gate keeps its hook whatever the grouping: it is a place to pause, and a submodule that is entered out of the recorded order still waits for
    its own weights.
    """
    group_bytes = total_bytes // _WAIT_POINTS
    needs: list[tuple[str, int]] = []
    group_end = 0
    for gate in reversed(gates):
        if gate.need_bytes <= group_end - group_bytes or not needs:
            group_end = gate.need_bytes
        needs.append((gate.module, group_end))
    return tuple(reversed(needs))


class Gates:
    """The hooks on one module. `passed(need_bytes)` is called at each gate while it is armed."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module
        self._armed: Needs = ()
        self._handles: list[RemovableHandle] = []

    def arm(self, needs: Needs, passed: Callable[[int], None]) -> None:
        """Installs hooks for `needs`, unless they are there. The gate "" has none: whoever runs the model passes it first."""
        if self._armed == needs:
            return
        self.disarm()
        for name, need_bytes in needs:
            if name:
                self._handles.append(self._module.get_submodule(name).register_forward_pre_hook(_hook(need_bytes, passed)))
        self._armed = needs

    def disarm(self) -> None:
        """Removes the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._armed = ()


def _hook(need_bytes: int, passed: Callable[[int], None]) -> Callable[[torch.nn.Module, object], None]:
    def at_entry(module: torch.nn.Module, inputs: object) -> None:
        passed(need_bytes)

    return at_entry
