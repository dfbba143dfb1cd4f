"""One node for all tests of the protocols."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from tests.protocol import node

logging.getLogger("torch.__trace").disabled = True  # an export writes hundreds of its lines into the report of a failure


@pytest.fixture(scope="session")
def served() -> Iterator[node.Node]:
    """The node; the same processes run at the end as at the beginning."""
    with node.running() as served:
        before = served.predictor().pid
        yield served
        assert served.predictor().pid == before, "the predictor ended, and was started again"
