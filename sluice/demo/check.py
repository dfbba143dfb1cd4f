"""The demo's checker, a process of its own because it alone here runs torch: makes real inputs, and says whether the answers are right.

`python -m sluice.demo.check inputs DIR` writes the samples that the load sends. `python -m sluice.demo.check answers DIR` loads every model without
any swapping, runs the very batches that the node ran, and compares bit for bit. Progress and results are JSON lines on standard output.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from contracts.artifact import Signature
from models import tokenizer
from models.describe import tokenizer_file
from models.load import Loaded, load
from models.samples import sample_inputs, sample_texts
from sluice.demo.work import Batch, Result, Task, read_tasks

Arrays = dict[str, NDArray[np.generic]]


def write_inputs(folder: Path, task: Task) -> None:
    """`task.samples` requests of one row each; every second one as text, if the model takes text."""
    arrays: Arrays = {}
    takes_text = tokenizer_file(task.model) is not None
    for sample in range(task.samples):
        if takes_text and sample % 2:
            arrays[f"{sample}/text"] = np.array(sample_texts(1, task.seed + sample))
            continue
        for name, array in sample_inputs(task.model, 1, task.seed + sample).items():
            arrays[f"{sample}/{name}"] = array
    np.savez(folder / task.inputs_file, **arrays)  # type: ignore[arg-type]


def check_answers(folder: Path, task: Task) -> Iterator[Result]:
    """A Result for each batch of one function."""
    batches = msgspec.json.decode((folder / task.batches_file).read_bytes(), type=list[Batch])
    if not batches:
        return
    model = load(task.model)
    with np.load(folder / task.inputs_file) as inputs, np.load(folder / task.answers_file) as answers:
        samples, given = _grouped(dict(inputs)), _grouped(dict(answers))
    for batch in batches:
        joined = _joined([_tokens(model, samples[sample]) for sample in batch.samples], model.signature)
        expected = {name: tensor.numpy() for name, tensor in model.run(joined).items()}
        yield _compare(task.function, batch, expected, [given[request] for request in batch.requests], model.signature)


def _tokens(model: Loaded, sample: Arrays) -> Arrays:
    """What the model takes for a sample that may be text."""
    text = model.signature.text
    if text is None or text.name not in sample:
        return sample
    return tokenizer.encode(tokenizer.build(model.tokenizer, text.max_tokens), model.signature, list(map(str, sample[text.name])))


def _joined(members: list[Arrays], signature: Signature) -> dict[str, torch.Tensor]:
    """The batch, each member padded to the longest as the signature says."""
    joined = {}
    for spec in signature.inputs:
        rows = [member[spec.name] for member in members]
        if spec.pad is not None:
            longest = np.max([row.shape for row in rows], axis=0)[1:]
            widths = [[(0, 0), *((0, most - size) for most, size in zip(longest, row.shape[1:], strict=True))] for row in rows]
            rows = [np.pad(row, width, constant_values=spec.pad) for row, width in zip(rows, widths, strict=True)]
        joined[spec.name] = torch.from_numpy(np.concatenate(rows))
    return joined


def _compare(function: str, batch: Batch, expected: Arrays, answers: list[Arrays], signature: Signature) -> Result:
    right, detail, row = 0, "", 0
    padded = {spec.name: [dim in signature.padded for dim in spec.shape] for spec in signature.outputs}
    for request, answer in zip(batch.requests, answers, strict=True):
        rows = len(next(iter(answer.values())))
        wanted = {name: _own(array[row : row + rows], answer.get(name), padded[name]) for name, array in expected.items()}
        row += rows
        if differences := [text for name, array in wanted.items() if (text := _difference(array, answer.get(name)))]:
            detail = f"request {request} in a batch of {len(answers)}: {'; '.join(differences)}"
        elif answer.keys() != wanted.keys():
            detail = f"request {request}: outputs {sorted(answer)} instead of {sorted(wanted)}"
        else:
            right += 1
    return Result(function, right, len(answers) - right, detail)


def _own(rows: NDArray[np.generic], answer: NDArray[np.generic] | None, padded: list[bool]) -> NDArray[np.generic]:
    """The rows of one member, without what only longer members have."""
    if answer is None or answer.ndim != rows.ndim:
        return rows
    return rows[tuple(slice(size if cut else None) for size, cut in zip(answer.shape, padded, strict=True))]


def _difference(wanted: NDArray[np.generic], got: NDArray[np.generic] | None) -> str:
    if got is None:
        return "an output is missing"
    if got.shape != wanted.shape or got.dtype != wanted.dtype:
        return f"{got.dtype}{list(got.shape)} instead of {wanted.dtype}{list(wanted.shape)}"
    if got.tobytes() == np.ascontiguousarray(wanted).tobytes():
        return ""
    return f"differs by up to {np.max(np.abs(got.astype(np.float64) - wanted.astype(np.float64))):.3g}"


def _grouped(arrays: Arrays) -> dict[int, Arrays]:
    found: dict[int, Arrays] = {}
    for key, array in arrays.items():
        number, _, name = key.partition("/")
        found.setdefault(int(number), {})[name] = array
    return found


def main() -> None:
    """The entry of the process."""
    parser = argparse.ArgumentParser(prog="python -m sluice.demo.check")
    parser.add_argument("what", choices=("inputs", "answers"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, default=1, help="as the node's lanes have; results may depend on it")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    for task in read_tasks(given.folder):
        if given.what == "inputs":
            write_inputs(given.folder, task)
        else:
            for result in check_answers(given.folder, task):
                sys.stdout.write(msgspec.json.encode(result).decode() + "\n")
                sys.stdout.flush()


if __name__ == "__main__":
    main()
