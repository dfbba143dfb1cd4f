"""These run in a process of their own, started by test_clients.py, which says in the environment where the node listens."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(scope="session")
def http() -> str:
    """host:port of HTTP."""
    return os.environ["SLUICE_TEST_HTTP"]


@pytest.fixture(scope="session")
def rpc() -> str:
    """host:port of gRPC."""
    return os.environ["SLUICE_TEST_GRPC"]
