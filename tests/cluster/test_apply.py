import copy
from pathlib import Path

import pytest
import yaml
from kubernetes.client.exceptions import ApiException

from contracts.functions import from_inference_service

ROOT = Path(__file__).parents[2]
RUNTIME = yaml.safe_load((ROOT / "manifests/base/clusterservingruntime.yaml").read_text())
FILES = [*sorted(path for path in (ROOT / "manifests/samples").glob("*.yaml") if path.name != "kustomization.yaml"), ROOT / "examples/functions.yaml"]
SERVICES = {document["metadata"]["name"]: document for path in FILES for document in yaml.safe_load_all(path.read_text())}

pytestmark = pytest.mark.cluster


def missing(wanted, found, path=""):
    """The places where `found` lacks what was applied: what the API server dropped, or changed."""
    if isinstance(wanted, dict) and isinstance(found, dict):
        return [place for key, value in wanted.items() for place in missing(value, found.get(key), f"{path}.{key}")]
    if isinstance(wanted, list) and isinstance(found, list) and len(wanted) == len(found):
        return [place for at, (one, other) in enumerate(zip(wanted, found, strict=True)) for place in missing(one, other, f"{path}[{at}]")]
    return [] if wanted == found else [f"{path}: {wanted!r} became {found!r}"]


def test_the_runtime_comes_back_whole(cluster):
    cluster.apply(RUNTIME)
    assert missing(RUNTIME, cluster.read(RUNTIME)) == []


@pytest.mark.parametrize("document", SERVICES.values(), ids=SERVICES)
def test_an_inference_service_comes_back_whole_and_is_still_the_same_function(cluster, namespace, document):
    wanted = copy.deepcopy(document)
    wanted["metadata"]["namespace"] = namespace
    cluster.apply(wanted, namespace)
    found = cluster.read(wanted, namespace)
    assert missing(wanted, found) == []
    assert from_inference_service(found) == from_inference_service(wanted)


def test_applying_again_changes_nothing(cluster):
    first = cluster.apply(RUNTIME)
    assert cluster.apply(RUNTIME)["metadata"]["resourceVersion"] == first["metadata"]["resourceVersion"]


WRONG = {
    "a text for a number": (("spec", "predictor", "minReplicas"), "one"),
    "a mapping for a text": (("spec", "predictor", "model", "storageUri"), {"uri": "s3://x"}),
    "a model without its format": (("spec", "predictor", "model", "modelFormat"), {"version": "1"}),
    "a name that is no DNS label": (("metadata", "name"), "Mini_LM"),
}


@pytest.mark.parametrize(("path", "value"), WRONG.values(), ids=WRONG)
def test_a_wrong_document_is_refused(cluster, namespace, path, value):
    document = copy.deepcopy(SERVICES["minilm"])
    at = document
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    with pytest.raises(ApiException) as caught:
        cluster.apply(document, namespace)
    assert caught.value.status in (400, 422, 500)
    assert path[-1] in caught.value.body or repr(value) in caught.value.body


def test_a_field_that_there_is_not_is_refused_or_dropped_so_that_the_check_for_wholeness_sees_it(cluster, namespace):
    document = copy.deepcopy(SERVICES["minilm"])
    document["spec"]["predictor"]["model"]["storageURI"] = "s3://x"
    try:
        lost = missing(document, cluster.apply(document, namespace))
    except ApiException:
        lost = ["refused"]
    assert lost in (["refused"], [".spec.predictor.model.storageURI: 's3://x' became None"])
