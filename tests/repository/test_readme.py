"""The README keeps its word: its figures are those that were measured, its commands run as they stand."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from benchmarks.readme import RESULTS, ROOT, rendered

README = (ROOT / "README.md").read_text()
CURLS = re.findall(r"^\$ (curl .*)$", README, re.MULTILINE)
NAMED = ("mlp-a", "minilm")


def test_the_figures_are_those_of_the_committed_results() -> None:
    assert rendered(README) == README, "run: python -m benchmarks.readme"


def test_every_committed_result_is_shown() -> None:
    shown = re.findall(r"<!-- figures of benchmarks/results/(\w+)\.json", README)
    assert sorted(shown) == sorted(path.stem for path in RESULTS.glob("*.json"))


def test_every_folder_that_the_readme_names_is_there() -> None:
    named = re.findall(r"^\| `([a-z/]+)/` \|", README, re.MULTILINE)
    assert len(named) >= 8
    assert [name for name in named if not (ROOT / name).is_dir()] == []


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a node that serves the example's functions that the README calls."""
    folder: Path = tmp_path_factory.mktemp("readme")
    documents = [d for d in yaml.safe_load_all((ROOT / "examples" / "functions.yaml").read_text()) if d["metadata"]["name"] in NAMED]
    (folder / "functions.yaml").write_text(yaml.safe_dump_all(documents))
    command = [sys.executable, "-m", "sluice", "up", str(folder / "functions.yaml"), "--port", "0", "--run-dir", str(folder / "run"), "--json"]
    with (folder / "log").open("w") as log, subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True) as node:
        assert node.stdout is not None
        line = node.stdout.readline()
        assert line, (folder / "log").read_text()
        yield json.loads(line)["url"]
        node.terminate()


@pytest.mark.parametrize("command", CURLS, ids=range(len(CURLS)))
def test_a_curl_line_answers(command: str, url: str) -> None:
    done = subprocess.run(
        ["sh", "-c", command.replace("http://127.0.0.1:8080", url) + " -w '\\n%{http_code}'"], capture_output=True, text=True, check=True
    )
    body, code = done.stdout.rsplit("\n", 1)
    assert code == "200"
    assert "error" not in json.loads(body)
