"""A whole node, everything real: `sluice up` as a process, small models, the command line against it, faults, and what is left afterwards."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.sluice.node import TWO, Node, infer, serves, sluice, until


class TestServing:
    """One node for all of these, in order: the last ones hurt it."""

    @pytest.fixture(scope="class")
    @classmethod
    def started(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Node, Any]]:
        node = Node(tmp_path_factory.mktemp("node"), TWO)
        ready = node.line()
        yield node, ready
        code = node.end()
        assert (code, node.left_behind()) == (0, []), node.log.read_text()

    def test_it_says_where_it_serves(self, started: tuple[Node, Any]) -> None:
        node, ready = started
        assert ready["functions"] == ["default/mlp-a", "default/mlp-b"]
        assert ready["failed"] == {}
        assert ready["pid"] == node.process.pid

    def test_each_function_answers_with_its_own_weights(self, started: tuple[Node, Any]) -> None:
        url = started[1]["url"]
        answers = [infer(url, name)[0] for name in ("mlp-a", "mlp-b", "mlp-a")]

        data = [answer["outputs"][0]["data"] for answer in answers]
        assert data[0] == data[2] != data[1]
        assert {"sluice_queue_ms", "sluice_swap_ms", "sluice_run_ms"} <= answers[0]["parameters"].keys()

    def test_status_shows_what_was_asked(self, started: tuple[Node, Any]) -> None:
        run_dir = str(started[0].run_dir)
        infer(started[1]["url"], "mlp-a")

        status = json.loads(sluice("status", "--json", "--run-dir", run_dir).output)
        table = sluice("status", "--run-dir", run_dir).output

        found = {entry["key"]: entry for entry in status["functions"]}
        assert found["default/mlp-a"]["answered"] >= 1
        assert found["default/mlp-a"]["state"] == "ready"
        assert "default/mlp-a" in table
        assert "cpu:0" in table

    def test_share_changes_what_is_given_and_keeps_the_rest(self, started: tuple[Node, Any]) -> None:
        run_dir = str(started[0].run_dir)

        result = sluice("share", "mlp-b", "--sm", "40", "--run-dir", run_dir)
        assert result.exit_code == 0, result.output
        assert "default/mlp-b: 100 % SM x 5 % of the time (limit 100 %) -> 40 % SM x 5 % of the time (limit 100 %)" in result.output
        result = sluice("share", "default/mlp-b", "--quota", "6", "--limit", "50", "--json", "--run-dir", run_dir)
        assert json.loads(result.output)["after"] == {"sm_percent": 40, "quota_bp": 600, "limit_bp": 5000}

        assert serves(started[1]["url"], "mlp-b")

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (("nobody", "--sm", "10"), ["'nobody'", "default/mlp-a"]),
            (("mlp-a", "--sm", "101"), ["sm-percent", "101"]),
            (("mlp-a", "--quota", "0.001"), ["quota-percent", "0.001"]),
            (("mlp-a", "--quota", "99.99"), ["default/mlp-a"]),
        ],
        ids=["an unknown function", "a bad SM", "a bad quota", "a share that the device cannot guarantee"],
    )
    def test_a_bad_share_is_refused_with_the_reason(self, started: tuple[Node, Any], arguments: tuple[str, ...], words: list[str]) -> None:
        result = sluice("share", *arguments, "--run-dir", str(started[0].run_dir))

        assert result.exit_code == 1
        assert [word for word in words if word not in result.stderr] == []

    def test_a_second_node_in_the_same_place_or_on_the_same_port_is_refused(self, started: tuple[Node, Any], tmp_path: Path) -> None:
        node, ready = started
        (tmp_path / "f.yaml").write_text(TWO)
        place = sluice("up", str(tmp_path / "f.yaml"), "--run-dir", str(node.run_dir), "--port", "0")
        other = tmp_path / "run"
        port = sluice("up", str(tmp_path / "f.yaml"), "--run-dir", str(other), "--port", ready["url"].rpartition(":")[2])

        assert (place.exit_code, port.exit_code) == (1, 1)
        assert f"process {node.process.pid}" in place.stderr
        assert "Address already in use" in port.stderr
        assert not other.exists()
        assert serves(ready["url"], "mlp-a")

    def test_it_serves_again_after_kill_9_of_the_predictor(self, started: tuple[Node, Any]) -> None:
        node, ready = started
        first = node.child("predictor")
        first.kill()

        until(lambda: not first.is_running() and serves(ready["url"], "mlp-a"))
        node.remember()

    def test_it_serves_again_after_kill_9_of_the_agent_with_the_shares_of_before(self, started: tuple[Node, Any]) -> None:
        node, ready = started
        run_dir = str(node.run_dir)
        node.remember()
        first = node.child("nodeagent")
        assert sluice("share", "mlp-b", "--sm", "30", "--run-dir", run_dir).exit_code == 0
        first.kill()

        until(lambda: not first.is_running() and serves(ready["url"], "mlp-a") and serves(ready["url"], "mlp-b"))

        node.remember()
        status = json.loads(sluice("status", "--json", "--run-dir", run_dir).output)
        shares = {entry["key"]: entry["share"]["sm_percent"] for entry in status["functions"]}
        assert shares == {"default/mlp-a": 100, "default/mlp-b": 30}
