"""The profiling Job: the functions that it mounts are read as the command line reads them, and its command is one that the command line takes."""

from pathlib import Path

import click
import yaml

from sluice.cli import main
from sluice.documents import read_functions

ROOT = Path(__file__).parents[2]
DOCUMENTS = {document["kind"]: document for document in yaml.safe_load_all((ROOT / "manifests/jobs/profile.yaml").read_text())}
POD = DOCUMENTS["Job"]["spec"]["template"]["spec"]
(CONTAINER,) = POD["containers"]


def test_the_job_measures_the_functions_that_it_mounts(tmp_path):
    program, group, command, *arguments = [*CONTAINER["command"], *CONTAINER["args"]]
    mounted = Path(arguments[arguments.index("-f") + 1])
    file = tmp_path / mounted.name
    file.write_text(DOCUMENTS["ConfigMap"]["data"][mounted.name])
    context = click.Context(main)
    sweep = main.get_command(context, group).get_command(context, command)
    parsed = sweep.make_context(command, [str(file) if each == str(mounted) else each for each in arguments]).params
    assert program == "sluice"
    assert list(parsed["functions"]) == [function.name for function in read_functions([file])]
    assert str(parsed["points"]).startswith("/profiles/")


def test_what_the_job_writes_lies_in_the_claim_and_its_mounts_are_there():
    mounts = {mount["name"]: mount["mountPath"] for mount in CONTAINER["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in POD["volumes"]}
    assert set(mounts) == set(volumes)
    assert CONTAINER["args"][CONTAINER["args"].index("-o") + 1].startswith(f"{mounts['profiles']}/")
    assert volumes["profiles"]["persistentVolumeClaim"]["claimName"] == DOCUMENTS["PersistentVolumeClaim"]["metadata"]["name"]
    assert volumes["functions"]["configMap"]["name"] == DOCUMENTS["ConfigMap"]["metadata"]["name"]


def test_a_killed_pod_goes_on_where_it_ended():
    assert POD["restartPolicy"] == "OnFailure"
    assert DOCUMENTS["Job"]["spec"]["backoffLimit"] > 0
