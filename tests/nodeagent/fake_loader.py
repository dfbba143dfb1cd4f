"""A loader at the seam of `models.loader`: the source says what it does.

`file:///add?value=V` makes a model that adds V to each number of a row of four, `bytes=N` gives it that many bytes of weights, all its options travel
to the fake worker. `broken` is refused, `die` ends the process.
"""

from __future__ import annotations

import json
import os
import struct
import sys
from pathlib import Path
from urllib.parse import parse_qsl

import msgspec
from blake3 import blake3

from contracts.artifact import Gate, Program, Signature, TensorEntry, TensorSpec, WeightIndex
from contracts.errors import InvalidArtifact, SluiceError, Unavailable, to_wire
from contracts.functions import ModelFormat, ModelRef
from models.store import identity, ref_name

_ROW = (TensorSpec("x", "FP32", ("batch", 4)),)
_SIGNATURE = Signature(_ROW, (TensorSpec("y", "FP32", ("batch", 4)),))


def load(source: str, store: Path, limit_bytes: int) -> str:
    """Writes the model; returns its digest."""
    kind, _, query = source.removeprefix("file:///").partition("?")
    options = dict(parse_qsl(query))
    if kind == "die":
        os._exit(3)
    if kind == "broken":
        raise InvalidArtifact("is no model", key="source", value=source)
    total = int(options.get("bytes", 256))
    if total > limit_bytes:
        raise Unavailable(f"the model takes {total} bytes, {limit_bytes} are left of the host memory budget")
    data = struct.pack("<f", float(options.get("value", 0))) + source.encode()[: total - 4].ljust(total - 4, b"\0")
    fresh = store / "fresh.tmp"
    fresh.write_bytes(data)
    entry = TensorEntry("value", "float32", (1,), 0, 4)
    index = WeightIndex("", total, (entry,), (Gate("", total),), Program("catalog", "add", json.dumps(options)), _SIGNATURE, 1_000_000)
    digest = blake3(data).update(identity(index)).hexdigest()
    fresh.rename(store / f"{digest}.weights")
    (store / f"{digest}.json").write_bytes(msgspec.json.encode(msgspec.structs.replace(index, digest=digest)))
    (store / ref_name(ModelRef(ModelFormat.TORCH_EXPORT, source))).write_text(digest)
    return digest


def main() -> None:
    """Serves standard input until it ends."""
    store = Path(sys.argv[sys.argv.index("--store") + 1])
    for line in sys.stdin:
        ask = json.loads(line)
        answer: dict[str, object] = {"id": ask["id"]}
        try:
            answer["digest"] = load(ask["source"], store, ask["limit_bytes"])
        except SluiceError as error:
            answer["error"] = to_wire(error)[:2]
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
