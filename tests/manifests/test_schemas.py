import copy
from pathlib import Path

import jsonschema
import pytest
import yaml

from contracts.functions import from_inference_service
from sluice.documents import read_functions

ROOT = Path(__file__).parents[2]
KUSTOMIZATIONS = sorted((ROOT / "manifests").glob("*/kustomization.yaml"))
FILES = [*sorted(path for path in (ROOT / "manifests").rglob("*.yaml") if path.name != "kustomization.yaml"), ROOT / "examples" / "functions.yaml"]
DOCUMENTS = {
    f"{path.relative_to(ROOT)}:{document['kind']}/{document['metadata']['name']}": document
    for path in FILES
    for document in yaml.safe_load_all(path.read_text())
    if "kserve.io/" in document["apiVersion"]
}
SERVICES = {name: document for name, document in DOCUMENTS.items() if document["kind"] == "InferenceService"}
RUNTIME = DOCUMENTS["manifests/base/clusterservingruntime.yaml:ClusterServingRuntime/sluice"]


def validate(schemas, document):
    schemas[document["apiVersion"], document["kind"]].validate(document)


@pytest.mark.parametrize("document", DOCUMENTS.values(), ids=DOCUMENTS)
def test_every_document_fits_kserves_own_schema(schemas, document):
    validate(schemas, document)


WRONG = {
    "a field that there is not": (("spec", "predictor", "model", "storageURI"), "file:///x"),
    "a field one level too high": (("spec", "model"), {}),
    "a number for a text": (("spec", "predictor", "model", "storageUri"), 5),
    "an annotation that is no text": (("metadata", "annotations", "sluice.dev/sm-percent"), 50),
    "a name that is no DNS label": (("metadata", "name"), "Mini_LM"),
}


@pytest.mark.parametrize(("path", "value"), WRONG.values(), ids=WRONG)
def test_the_schemas_are_strict_enough_to_refuse(schemas, path, value):
    document = copy.deepcopy(SERVICES["manifests/samples/minilm.yaml:InferenceService/minilm"])
    at = document
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        validate(schemas, document)


@pytest.mark.parametrize("document", SERVICES.values(), ids=SERVICES)
def test_every_inference_service_is_a_function_of_ours(document):
    function = from_inference_service(document)
    assert function.name == document["metadata"]["name"]


def test_the_examples_are_read_as_the_command_line_reads_them():
    functions = read_functions([ROOT / "examples" / "functions.yaml"])
    assert [function.name for function in functions] == [
        document["metadata"]["name"] for name, document in SERVICES.items() if name.startswith("examples/")
    ]


@pytest.mark.parametrize("document", SERVICES.values(), ids=SERVICES)
def test_every_inference_service_asks_for_a_format_and_protocol_that_the_runtime_offers(document):
    model = document["spec"]["predictor"]["model"]
    assert model["runtime"] == RUNTIME["metadata"]["name"]
    assert model["modelFormat"]["name"] in [offered["name"] for offered in RUNTIME["spec"]["supportedModelFormats"]]
    assert model.get("protocolVersion", "v1") in RUNTIME["spec"]["protocolVersions"]


@pytest.mark.parametrize("path", KUSTOMIZATIONS, ids=lambda path: path.parent.name)
def test_a_kustomization_names_every_file_beside_it(path):
    named = yaml.safe_load(path.read_text())["resources"]
    assert sorted(named) == sorted(other.name for other in path.parent.glob("*.yaml") if other != path)
