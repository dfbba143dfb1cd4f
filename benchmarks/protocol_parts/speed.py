"""Speed: the same requests to our server, KServe's own and an echo, in turns, so that the machine's moods fall on all of them alike."""

from __future__ import annotations

import contextlib
import statistics
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import psutil

from benchmarks.protocol_parts import models, servers
from benchmarks.protocol_parts.client import Leg, Timing
from benchmarks.protocol_parts.messages import IDENTITY, KINDS
from contracts.units import MS

SMALL, LARGE = 4, 150_528
"""Values of a request: 16 bytes, and a picture of 3 x 224 x 224 (602 KB)."""
CROWD = 16


class Client:
    """The process that loads the servers."""

    def __init__(self, process: psutil.Popen) -> None:
        self._process = process

    def measure(self, leg: Leg) -> Timing:
        """One leg; RuntimeError when the client failed."""
        self._process.stdin.write(msgspec.json.encode(leg) + b"\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the client failed at {leg}")
        return msgspec.json.decode(line, type=Timing)


@contextlib.contextmanager
def client() -> Iterator[Client]:
    """The client, started."""
    with servers.running("benchmarks.protocol_parts.client") as process:
        yield Client(process)


@dataclass(frozen=True, slots=True)
class Case:
    """One kind of request, its size, and how many at a time."""

    kind: str
    values: int
    concurrency: int


@dataclass(slots=True)
class Seen:
    """One server in one case, round by round: the median latency, requests per second, and the CPU time of all its processes for a request."""

    p50_ms: list[float] = field(default_factory=list)
    per_s: list[float] = field(default_factory=list)
    cpu_us: list[float] = field(default_factory=list)

    @property
    def latency_ms(self) -> float:
        """The median of the rounds."""
        return statistics.median(self.p50_ms)

    @property
    def throughput(self) -> float:
        """The median of the rounds."""
        return statistics.median(self.per_s)

    @property
    def cost_us(self) -> float:
        """The median of the rounds."""
        return statistics.median(self.cpu_us)


CASES = [Case(kind, values, concurrency) for kind in KINDS for values, concurrency in ((SMALL, 1), (SMALL, CROWD), (LARGE, 1))]

Found = Mapping[tuple[Case, str], Seen]


def measure(rounds: int, seconds: float, least: int) -> Found:
    """`rounds` turns of every case, each leg `seconds` long and `least` requests at the fewest; servers are "stock", "ours" and "echo"."""
    found: dict[tuple[Case, str], Seen] = {}
    with tempfile.TemporaryDirectory(prefix="sluice-identity-") as folder:
        program = Path(folder, "identity.pt2")
        models.export_identity(program)
        document = models.document(IDENTITY, program, quota_percent=90)
        with servers.stock() as stock, servers.echo() as echo, servers.ours(document) as (ours, _), client() as load:
            beside = {"stock": stock, "ours": ours, "echo": echo}
            for number in range(rounds):
                for case in CASES:
                    names = [name for name in beside if name != "echo" or case.kind == "binary"]
                    for name in names if number % 2 else reversed(names):
                        server = beside[name]
                        leg = Leg(server.port(case.kind), case.kind, case.values, case.concurrency, seconds, least, echo=name == "echo")
                        before_s = server.cpu_s()
                        timing = load.measure(leg)
                        used_s = sum(after_s - before_s.get(pid, 0.0) for pid, after_s in server.cpu_s().items())
                        seen = found.setdefault((case, name), Seen())
                        seen.p50_ms.append(statistics.median(timing.latencies_ns) / MS)
                        seen.per_s.append(timing.per_s)
                        seen.cpu_us.append(used_s * 1e6 / timing.asked)
    return found
