"""The start of the standalone pod: what KServe fills in, and what the container's script then makes of it, run by a real shell."""

import json
import os
import re
import subprocess
from pathlib import Path

import msgspec
import pytest
import yaml

from contracts.functions import Function, ModelFormat, ModelRef, from_inference_service
from sluice.cli import main
from sluice.documents import read_functions

ROOT = Path(__file__).parents[2]
RUNTIME = yaml.safe_load((ROOT / "manifests/base/clusterservingruntime.yaml").read_text())["spec"]
SAMPLES = {
    path.stem: yaml.safe_load(path.read_text()) for path in sorted((ROOT / "manifests/samples").glob("*.yaml")) if path.name != "kustomization.yaml"
}
FILES = {"torch-export": "program.pt2", "torchscript": "nested/program.pt", "safetensors": "model.safetensors", "sluice-catalog": "README"}
ACTION = re.compile(r"\{\{(?:\.(\w+)|or \(index \.Annotations `([^`]+)`\) `([^`]+)`)\}\}")


def fill_in(container, metadata):
    """What KServe does with Go's text/template over the container's JSON, for the two forms of action that the runtime uses."""

    def value(match):
        field, annotation, default = match.groups()
        if field:
            return {"Name": metadata["name"], "Namespace": metadata.get("namespace", "default")}[field]
        return metadata.get("annotations", {}).get(annotation) or default

    filled = ACTION.sub(value, json.dumps(container))
    assert "{{" not in filled, "an action that this test does not know"
    return json.loads(filled)


def start(document, folder, *, arguments=()):
    """Runs the container's command as the kubelet would, with a `sluice` that notes its arguments; they, and the document it was given."""
    (container,) = RUNTIME["containers"]
    filled = fill_in(container, document["metadata"])
    noted = folder / "arguments"
    sluice = folder / "bin" / "sluice"
    sluice.parent.mkdir()
    sluice.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" >{noted}\n')
    sluice.chmod(0o755)
    environment = {entry["name"]: entry["value"] for entry in filled["env"]}
    environment |= {"PATH": f"{sluice.parent}:{os.environ['PATH']}", "MODELS": str(folder / "models"), "TMPDIR": str(folder)}
    subprocess.run([*filled["command"], *filled["args"], *arguments], env=environment, check=True)
    return noted.read_text().splitlines()


def put_model(folder, format_):
    file = folder / "models" / FILES[format_]
    file.parent.mkdir(parents=True)
    file.write_bytes(b"")
    return f"file://{file}"


@pytest.mark.parametrize("document", SAMPLES.values(), ids=SAMPLES)
def test_the_pod_serves_the_function_that_the_inference_service_describes(document, tmp_path):
    source = put_model(tmp_path, document["spec"]["predictor"]["model"]["modelFormat"]["name"])
    arguments = start(document, tmp_path)
    (served,) = read_functions([Path(arguments[1])])
    wanted = from_inference_service(document)
    if wanted.model.format is not ModelFormat.CATALOG:
        wanted = msgspec.structs.replace(wanted, model=ModelRef(wanted.model.format, source))
    assert served == wanted


@pytest.mark.parametrize("format_", [format_ for format_ in FILES if format_ != "sluice-catalog"])
def test_without_annotations_the_pod_serves_with_the_defaults_and_tells_the_format_by_the_file(format_, tmp_path):
    source = put_model(tmp_path, format_)
    arguments = start({"metadata": {"name": "plain"}}, tmp_path)
    assert read_functions([Path(arguments[1])]) == [Function("plain", ModelRef(ModelFormat(format_), source))]


def test_the_pods_arguments_are_arguments_of_sluice_up_and_the_inference_services_own_come_last(tmp_path):
    put_model(tmp_path, "torch-export")
    arguments = start(SAMPLES["resnet-export"], tmp_path, arguments=SAMPLES["resnet-export"]["spec"]["predictor"]["model"]["args"])
    assert arguments[-2:] == ["--threads", "2"]
    command = main.commands[arguments[0]]
    parsed = command.make_context("sluice up", arguments[1:]).params
    assert (parsed["host"], parsed["port"], parsed["threads"]) == ("0.0.0.0", 8080, 2)


def test_the_probes_ask_the_port_that_is_served_for_the_one_model():
    (container,) = RUNTIME["containers"]
    filled = fill_in(container, {"name": "minilm"})
    for probe in ("startupProbe", "readinessProbe"):
        assert filled[probe]["httpGet"] == {"path": "/v2/models/minilm/ready", "port": 8080}
    assert [port["containerPort"] for port in filled["ports"]] == [8080]


def test_the_runtime_offers_every_format_that_there_is():
    assert sorted(offered["name"] for offered in RUNTIME["supportedModelFormats"]) == sorted(ModelFormat)
