"""The fork server must never ask CUDA for anything: what is forked from a process that did can use no GPU."""

from __future__ import annotations

import subprocess
import sys

from tests.predictor.worker.conftest import PATIENCE_S, ROOT

LOADS = """
import torch
def asked(*args, **kwargs):
    raise SystemExit("CUDA was asked")
for name in ("is_available", "device_count", "init", "_lazy_init", "current_device"):
    setattr(torch.cuda, name, asked)
from predictor.worker.__main__ import _load_networks
_load_networks()
"""


def test_loading_torch_and_the_networks_asks_cuda_for_nothing() -> None:
    done = subprocess.run([sys.executable, "-c", LOADS], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert (done.returncode, done.stderr) == (0, "")
