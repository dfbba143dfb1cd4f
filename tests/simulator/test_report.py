"""`sluice simulate` as a user runs it: table, JSON, plots, page and timeline agree; errors are one line."""

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from simulator.report import SHOWN
from sluice.simulate import command
from tests.simulator.test_scenario import SMALL, written


class Page(HTMLParser):
    """Counts what a page refers to and shows."""

    def __init__(self) -> None:
        super().__init__()
        self.outside: list[str] = []
        self.pictures = self.rows = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.pictures += tag == "img"
        self.rows += tag == "tr"
        self.outside += [value for key, value in attrs if key in ("src", "href") and value and not value.startswith("data:")]


@pytest.fixture(scope="module")
def written_report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    document = {**SMALL, "policies": ["sluice", "torpor"], "span_s": 20}
    done = CliRunner().invoke(command, [str(written(document, folder)), "--seeds", "2", "--processes", "2", "-o", str(folder / "out")])
    assert done.exit_code == 0, done.output
    assert "torpor" in done.output
    return folder / "out"


def test_the_numbers_are_there_for_every_policy_seed_and_function(written_report: Path) -> None:
    report = json.loads((written_report / "report.json").read_text())
    assert set(report["policies"]) == {"sluice", "torpor"}
    sluice, torpor = (report["policies"][policy] for policy in ("sluice", "torpor"))
    assert [run["requests"] for run in sluice["seeds"]] == [run["requests"] for run in torpor["seeds"]], "the same load"
    assert sluice["mean"]["requests"] == sum(run["requests"] for run in sluice["seeds"]) / 2
    for functions in report["functions"].values():
        assert sum(one["requests"] for one in functions) == sluice["seeds"][0]["requests"]


def test_the_page_needs_nothing_beside_it(written_report: Path) -> None:
    page = Page()
    page.feed((written_report / "index.html").read_text())
    assert (page.pictures, page.rows, page.outside) == (2, 1 + len(SHOWN), [])
    for name in ("latency.png", "cost.png"):
        with Image.open(written_report / name) as picture:
            assert picture.width > 600


def test_the_timeline_draws_lanes_that_do_one_thing_at_a_time(written_report: Path) -> None:
    events = json.loads((written_report / "timeline.json").read_text())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    names = {event["args"]["name"] for event in events if event["ph"] == "M"}
    assert {"gpu:0", "gpu:1", "links"} <= names
    assert any(span["name"].startswith("copy") for span in spans)
    ends: dict[int, float] = {}
    for span in sorted(spans, key=lambda span: span["ts"]):
        assert span["ts"] >= ends.get(span["tid"], 0) - 0.001
        ends[span["tid"]] = span["ts"] + span["dur"]


def test_json_for_machines(tmp_path: Path) -> None:
    document = {**SMALL, "policies": ["lalb"], "span_s": 5}
    done = CliRunner().invoke(command, [str(written(document, tmp_path)), "--json", "--policy", "sluice"])
    assert set(json.loads(done.stdout)["policies"]) == {"sluice"}


@pytest.mark.parametrize(("change", "policy", "named"), [({"span_s": -1}, "sluice", "span_s"), ({}, "magic", "magic")])
def test_what_is_wrong_is_said_in_one_line_before_anything_runs(change: dict[str, object], policy: str, named: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(command, [str(written({**SMALL, **change}, tmp_path)), "--policy", policy, "-o", str(tmp_path / "out")])
    assert done.exit_code == 1
    assert named in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
