"""schemathesis over the server's own description: whatever is sent, the server does not fail, and answers as it says there."""

from __future__ import annotations

import os
import urllib.request
from collections.abc import Iterator

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from schemathesis.specs.openapi import checks

from tests.protocol.outside.expected import FUNCTIONS

URL = f"http://{os.environ['SLUICE_TEST_HTTP']}"
SCHEMA = schemathesis.openapi.from_url(f"{URL}/openapi.json")
DESCRIBED = [checks.status_code_conformance, checks.content_type_conformance, checks.response_schema_conformance]


@pytest.fixture(autouse=True, scope="module")
def _everything_is_loaded_again() -> Iterator[None]:
    yield
    for name in FUNCTIONS:
        urllib.request.urlopen(urllib.request.Request(f"{URL}/v2/repository/models/{name}/load", method="POST"), timeout=60).close()


@SCHEMA.given(name=st.none() | st.sampled_from(sorted(FUNCTIONS)))
@SCHEMA.parametrize()
@settings(max_examples=8, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
def test_nothing_makes_the_server_fail(case: schemathesis.Case, name: str | None) -> None:
    if name is not None and "name" in case.path_parameters:
        case.path_parameters["name"] = name  # what schemathesis makes up is nobody's
    response = case.call(timeout=60)
    assert response.status_code in (501, 503, 504) or response.status_code < 500, response.text
    case.validate_response(response, checks=DESCRIBED)


def test_the_description_names_what_there_is() -> None:
    paths = {result.ok().path for result in SCHEMA.get_all_operations()}
    assert {"/v1/models/{name}:predict", "/v2/models/{name}/infer", "/v2/repository/index", "/v2/models/{name}/stats"} <= paths
