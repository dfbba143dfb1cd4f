"""What the predictor front may not bring into its process."""

import subprocess
import sys

from tests.predictor.front_process import ROOT

FORBIDDEN = {"fastapi", "grpc", "kserve", "pandas", "torch", "nodeagent", "predictor.worker", "transformers"}

OF_MODELS = {"models", "models.archive", "models.tokenizer"}
"""Tokenizers: the loader checks them with the code that runs them here."""


def test_the_front_brings_no_torch_and_no_other_room() -> None:
    code = "import sys; sys.argv[1:] = []; import predictor.server; print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    assert "predictor.dispatch" in found
    assert not FORBIDDEN & set(found)
    assert {name for name in found if name.partition(".")[0] == "models"} == OF_MODELS
