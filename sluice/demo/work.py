"""The files by which the demo and its checker work together: one folder, a task for each function."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from contracts.functions import ModelRef

_TASKS = "tasks.json"


class Task(msgspec.Struct, frozen=True):
    """One function: `samples` requests are made for it, from `seed` on. Arrays are named `number/tensor` in its files."""

    number: int
    function: str
    model: ModelRef
    samples: int
    seed: int

    @property
    def inputs_file(self) -> str:
        """The samples, by their number."""
        return f"{self.number}.inputs.npz"

    @property
    def answers_file(self) -> str:
        """The node's outputs, by the request's number."""
        return f"{self.number}.answers.npz"

    @property
    def batches_file(self) -> str:
        """The batches that the node ran: a list of Batch."""
        return f"{self.number}.batches.json"


class Batch(msgspec.Struct, frozen=True):
    """Requests that ran together, in the order of their rows, and the sample that each of them sent."""

    requests: tuple[int, ...]
    samples: tuple[int, ...]


class Result(msgspec.Struct, frozen=True):
    """What the checker found in one batch."""

    function: str
    right: int
    wrong: int
    detail: str = ""


def write_tasks(folder: Path, tasks: Sequence[Task]) -> None:
    """Leaves the tasks for the checker."""
    (folder / _TASKS).write_bytes(msgspec.json.encode(tasks))


def read_tasks(folder: Path) -> list[Task]:
    """The tasks that were left."""
    return msgspec.json.decode((folder / _TASKS).read_bytes(), type=list[Task])
