"""`python -m benchmarks.gpu_parts.facts [-o FILE] [NAME...]`: what a GPU says to the questions that the decisions about GPUs had to leave open.

A question that fails, or takes too long, says why and stops no other; `scripts/gpu-check` runs all of them first. Prints an answer as it comes, and
writes JSON. Judges nothing: docs/decisions says what follows from the answers.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.gpu_parts.fact_questions import QUESTIONS, Answer, Kept, Stand
from benchmarks.result import machine, versions
from contracts.errors import SluiceError
from nodeagent.shell.gpus import GPUS_COMMAND, Gpu, find_gpu

_LIMITS = {question.__name__: (question, seconds) for question, seconds in QUESTIONS.items()}


async def ask(gpu: Gpu, names: Sequence[str], **commands: tuple[str, ...]) -> dict[str, Answer]:
    """The answers by name; of one that was not answered, {"failed": reason}. `seconds` is what it took in either case."""
    found: dict[str, Answer] = {}
    kept = Kept()
    for name in names:
        began = time.monotonic()
        found[name] = await _ask(gpu, name, kept, commands)
        if "failed" in found[name]:
            await kept.end()
        found[name]["seconds"] = time.monotonic() - began
        print(f"{name}: {', '.join(f'{key} {_shown(value)}' for key, value in found[name].items())}", flush=True)
    await kept.end()
    return found


async def _ask(gpu: Gpu, name: str, kept: Kept, commands: Mapping[str, tuple[str, ...]]) -> Answer:
    question, seconds = _LIMITS[name]
    try:
        async with asyncio.timeout(seconds), contextlib.AsyncExitStack() as stack:
            return await question(Stand(gpu, stack, kept, **commands))
    except TimeoutError:
        return {"failed": f"no answer within {seconds:g} s"}
    except SluiceError as error:
        return {"failed": error.message}
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}"}


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> int:
    """1 when a question was not answered, 2 when there is no GPU to ask."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_parts.facts", description="Asks a GPU what had to be left open.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(_LIMITS)} (default: all)")
    parser.add_argument("-o", "--output", type=Path, help="write the answers there as JSON")
    parser.add_argument("--device", default="cuda:0", help="which GPU (default: cuda:0)")
    given = parser.parse_args()
    unknown = set(given.names) - set(_LIMITS)
    if unknown:
        parser.error(f"no such question: {', '.join(sorted(unknown))}; there are: {', '.join(_LIMITS)}")

    async def all_of_them() -> dict[str, Answer]:
        return await ask(await find_gpu(GPUS_COMMAND, given.device), given.names or list(_LIMITS))

    try:
        found = asyncio.run(all_of_them())
    except SluiceError as error:
        print(f"there is nothing to ask: {error}", file=sys.stderr)
        return 2
    if given.output:
        given.output.parent.mkdir(parents=True, exist_ok=True)
        document = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "machine": machine(), "versions": versions(), "facts": found}
        given.output.write_text(json.dumps(document, indent=1) + "\n")
    failed = [name for name, answer in found.items() if "failed" in answer]
    print(f"{len(found) - len(failed)} of {len(found)} questions answered{'; not: ' if failed else ''}{', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
