"""docs/scenarios.md: its example is a scenario, and each table names exactly the keys that there are, with their defaults."""

import re
from pathlib import Path

import msgspec
import pytest
import yaml

from simulator.baselines.kpa import Spec
from simulator.node import Hardware
from simulator.run import POLICIES, check
from simulator.scenario import Devices, Group, Load, Scenario, Times, build, load

TEXT = (Path(__file__).parents[2] / "docs" / "scenarios.md").read_text()
SECTIONS = {
    "The file": Scenario,
    "`devices`": Devices,
    "`functions`": Group,
    "`time`": Times,
    "`load`": Load,
    "`hardware`": Hardware,
    "`kpa`": Spec,
}


def test_the_example_is_a_scenario(tmp_path: Path) -> None:
    (example, *parts) = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)
    path = tmp_path / "scenario.yaml"
    path.write_text(example)
    scenario = load(path)
    check(scenario.policies)
    assert len(build(scenario, 0).functions) == 21
    for part in parts:
        msgspec.convert(yaml.safe_load(part)["time"], Times)


def rows(title: str) -> dict[str, str]:
    """Key -> default, of the table below a heading."""
    section = re.split(r"^#+ ", TEXT.partition(f"# {title}\n")[2], maxsplit=1, flags=re.MULTILINE)[0]
    return {key: default.strip() for key, default in re.findall(r"^\| `(\w+)` \|[^|]*\|([^|]*)\|", section, re.MULTILINE)}


@pytest.mark.parametrize("title", SECTIONS)
def test_every_key_is_named_with_its_default(title: str) -> None:
    fields = {field.encode_name: field for field in msgspec.structs.fields(SECTIONS[title])}
    told = rows(title)
    assert set(told) == set(fields)
    for key, field in fields.items():
        if isinstance(field.default, float | int) and re.fullmatch(r"[\d.]+", told[key]):
            assert float(told[key]) == pytest.approx(field.default), key
        assert told[key] or not isinstance(field.default, float | int), f"{key} has a default"


def test_every_pattern_and_policy_that_is_named_exists() -> None:
    named = re.findall(r"policies: \[(.*?)\]", TEXT)
    assert named
    assert {policy.strip() for line in named for policy in line.split(",")} <= set(POLICIES)
