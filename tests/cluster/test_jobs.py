"""The profiling Job comes back from a real API server as it was applied: no field was dropped or changed."""

from pathlib import Path

import pytest
import yaml

from tests.cluster.test_apply import missing

ROOT = Path(__file__).parents[2]
DOCUMENTS = list(yaml.safe_load_all((ROOT / "manifests/jobs/profile.yaml").read_text()))

pytestmark = pytest.mark.cluster


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document["kind"])
def test_every_document_comes_back_whole(cluster, namespace, document):
    cluster.apply(document, namespace)
    assert missing(document, cluster.read(document, namespace)) == []
