"""What is installed is what there is: packages, entry point, pins, and parts that start without torch."""

import importlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = PROJECT["tool"]["setuptools"]["packages"]
PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#"))


def tracked(pattern):
    listed = subprocess.run(["git", "ls-files", pattern], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return listed.stdout.splitlines()


def test_every_package_is_listed_and_every_listed_package_is_there():
    there = {str(Path(path).parent).replace("/", ".") for path in tracked("*/__init__.py")}
    assert sorted(PACKAGES) == sorted(name for name in there if name.partition(".")[0] not in ("benchmarks", "tests"))


def test_the_entry_point_is_there():
    module, _, name = PROJECT["project"]["scripts"]["sluice"].partition(":")
    assert callable(getattr(importlib.import_module(module), name))


def test_every_dependency_is_pinned_in_the_constraints():
    extras = PROJECT["project"]["optional-dependencies"].values()
    wanted = {re.split(r"[<>=\[]", one)[0].lower() for one in [*PROJECT["project"]["dependencies"], *(one for extra in extras for one in extra)]}
    pinned = {name.lower().replace("_", "-") for name in PINS}
    assert wanted - pinned == {"sluice"}
    assert not [pin for pin in PINS.values() if "+" in pin], "a local version fits one build only"


PROBE = """
import importlib, sys
for name in sys.argv[2:]:
    importlib.import_module(name)
print(sorted({name.partition(".")[0] for name in sys.modules} & set(sys.argv[1].split(","))))
"""
LIGHT = {
    "contracts": ("torch,kserve,numpy", ["contracts.wire", "contracts.channel", "contracts.lane_page"]),
    "the agent": ("torch,kserve,transformers", ["nodeagent.__main__"]),
    "the command line": ("torch,kserve,transformers", ["sluice.cli"]),
    "the predictor front": ("torch,kserve,fastapi,transformers", ["predictor.__main__"]),
}


@pytest.mark.parametrize(("heavy", "modules"), LIGHT.values(), ids=LIGHT)
def test_what_is_installed_without_torch_starts_without_torch(heavy, modules):
    done = subprocess.run([sys.executable, "-c", PROBE, heavy, *modules], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
