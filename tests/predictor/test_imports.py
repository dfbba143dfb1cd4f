"""What the predictor front may not bring into its process."""

import subprocess
import sys

import pytest

from tests.predictor.front_process import ROOT


@pytest.mark.parametrize("module", ["torch", "nodeagent", "models", "predictor.worker"])
def test_the_front_brings_no(module: str) -> None:
    code = f"import sys; sys.argv[1:] = []; import predictor.server; sys.exit({module!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
