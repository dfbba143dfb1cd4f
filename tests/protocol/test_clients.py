"""Clients that nobody here wrote, each in a process of its own: tritonclient's protobuf symbols collide with KServe's."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

from benchmarks.protocol_parts.servers import ROOT
from tests.protocol.node import PATIENCE_S, Node

OUTSIDE = "tests/protocol/outside"
CLIENTS = {"triton_http": "tritonclient", "triton_grpc": "tritonclient", "kserve_clients": "kserve", "openapi": "schemathesis"}


@pytest.mark.parametrize(("tests", "package"), CLIENTS.items(), ids=CLIENTS.keys())
def test_a_client_passes(served: Node, tests: str, package: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--tb=short",
        "--durations=3",
        "-p",
        "no:cacheprovider",
        f"--confcutdir={OUTSIDE}",
        f"{OUTSIDE}/{tests}.py",
    ]
    environment = {**os.environ, "SLUICE_TEST_HTTP": served.http, "SLUICE_TEST_GRPC": served.rpc}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=2 * PATIENCE_S)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
