"""A real Prometheus with samples of the test's own, backfilled as blocks, and functions that need no model."""

from __future__ import annotations

import contextlib
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[3] / "scripts" / "prometheus"
START_S = 120.0
Samples = Mapping[str, Sequence[tuple[int, float]]]
"""Series as OpenMetrics writes it -> (Unix time, value) ascending."""


@pytest.fixture(scope="session")
def binaries() -> Path:
    """Folder of prometheus and promtool; a skip where they are not to be had."""
    if shutil.which("bash") is None:
        pytest.skip("no bash for scripts/prometheus")
    found = subprocess.run([SCRIPT, "--there"], capture_output=True, text=True, check=False)
    if found.returncode:
        pytest.skip(found.stderr.strip())
    return Path(found.stdout.strip())


@pytest.fixture(scope="session")
def prometheus(binaries: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Samples], str]]:
    """Starts a Prometheus that holds these samples; gives its URL. It scrapes nothing."""
    with contextlib.ExitStack() as running:
        yield lambda samples: running.enter_context(_serving(binaries, tmp_path_factory.mktemp("prometheus"), samples))


@contextlib.contextmanager
def _serving(binaries: Path, folder: Path, samples: Samples) -> Iterator[str]:
    metrics, config, log = folder / "samples.txt", folder / "prometheus.yml", folder / "log"
    metrics.write_text(_openmetrics(samples))
    config.write_text("global: {}\n")
    subprocess.run([binaries / "promtool", "tsdb", "create-blocks-from", "openmetrics", metrics, folder / "data"], check=True, capture_output=True)
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
    command = [binaries / "prometheus", f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}", f"--web.listen-address=127.0.0.1:{port}"]
    with log.open("wb") as output:
        process = subprocess.Popen([*map(str, command), "--storage.tsdb.retention.time=10y"], stdout=output, stderr=output)
    try:
        _ready(f"http://127.0.0.1:{port}", process, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(START_S)


def _ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()[-2000:]
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/-/ready", timeout=5):
            return
        time.sleep(0.05)
    pytest.fail(f"Prometheus is not ready: {log.read_text()[-2000:]}")


def _openmetrics(samples: Samples) -> str:
    """Series of one metric stand together; promtool takes counters without a declared type as unknown, which rate() does not mind."""
    lines = [f"{series} {value} {at}" for series in sorted(samples) for at, value in samples[series]]
    return "\n".join([*lines, "# EOF", ""])
