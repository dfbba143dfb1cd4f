"""KServe's own schemas, made strict: a field that they do not know is an error, as the API server's pruning would silently drop it."""

import gzip
from pathlib import Path

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).parents[2]
CRDS = ROOT.parent / "shared" / "crds" / "kserve"


def strict(schema):
    """A structural schema as JSON Schema that forbids unknown fields, except below x-kubernetes-preserve-unknown-fields."""
    found = {key: value for key, value in schema.items() if not key.startswith("x-kubernetes-") and key not in ("properties", "items", "format")}
    if schema.get("x-kubernetes-int-or-string"):
        found = {"type": ["integer", "string"]}
    if "properties" in schema:
        found["properties"] = {name: strict(inner) for name, inner in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            found["additionalProperties"] = False
    if isinstance(schema.get("additionalProperties"), dict):
        found["additionalProperties"] = strict(schema["additionalProperties"])
    if "items" in schema:
        found["items"] = strict(schema["items"])
    return found


METADATA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$"},
        "namespace": {"type": "string"},
        "labels": {"type": "object", "additionalProperties": {"type": "string"}},
        "annotations": {"type": "object", "additionalProperties": {"type": "string"}},
    },
    "required": ["name"],
    "additionalProperties": False,
}


@pytest.fixture(scope="session")
def schemas():
    """(apiVersion, kind) -> validator."""
    if not CRDS.is_dir():
        pytest.skip("KServe's schemas are not here (../shared/crds/kserve)")
    found = {}
    for path in sorted(CRDS.glob("*.yaml.gz")):
        definition = yaml.load(gzip.decompress(path.read_bytes()), yaml.CSafeLoader)["spec"]
        for version in definition["versions"]:
            schema = strict(version["schema"]["openAPIV3Schema"])
            schema["properties"]["metadata"] = METADATA
            schema["required"] = ["apiVersion", "kind", "metadata", "spec"]
            found[f"{definition['group']}/{version['name']}", definition["names"]["kind"]] = jsonschema.Draft202012Validator(schema)
    return found
