"""A client of the facts about a GPU without torch and GPU: it counts on its share of a fake GPU's SMs, and joins the fake MPS daemon."""

from __future__ import annotations

import json
import mmap
import os
import signal
import sys
from typing import Any

from tests.fakes import gpu, mps_control

_WHOLE_NS = 1_000_000


class FakeClient:
    def __init__(self, backend: str, sms: int) -> None:
        shared = gpu.sms()
        self.sms = sms if backend == "green" else shared
        self.slab: mmap.mmap

    def says(self) -> dict[str, Any]:
        return {"sms": self.sms, "multiprocessors": self.sms, "affinity_sms": 0}

    def occupy(self) -> int:
        return _WHOLE_NS * gpu.SMS // self.sms

    def repeat(self, seconds: float) -> float:
        return self.occupy() / 1e6

    def busy(self, kernels: int) -> None:
        pass

    def works(self) -> bool:
        return True

    def open(self, handle: str, nbytes: int) -> float:
        with open(bytes.fromhex(handle), "r+b") as file:
            self.slab = mmap.mmap(file.fileno(), nbytes)
        return 0.0

    def fill(self, start: int, end: int, value: int) -> None:
        self.slab[start:end] = bytes([value]) * (end - start)

    def holds(self, start: int, end: int, value: int) -> bool:
        return self.slab[start:end] == bytes([value]) * (end - start)

    def fault(self) -> str:
        os.kill(int(mps_control.ask("control", "get_server_list")), signal.SIGUSR1)
        signal.pause()
        raise AssertionError("a client outlived its server")


if __name__ == "__main__":
    client = FakeClient(sys.argv[1], int(sys.argv[3]))
    for line in sys.stdin:
        verb, *arguments = json.loads(line)
        known = getattr(client, verb, None)
        print(json.dumps({"found": known(*arguments)} if known else {"error": f"no verb {verb}"}), flush=True)
