"""A real agent on fake GPUs: MPS control, slab holder, lanes and loader are the fakes.

FAKE_MPS=absent: this machine has no MPS. FAKE_BELOW=driver: holder, lanes and loader are the real ones, and only the driver below them is a fake.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import msgspec

from nodeagent.__main__ import main
from nodeagent.shell.options import parse

if __name__ == "__main__":
    python = sys.executable
    control = str(Path(__file__).with_name("mps_control.py"))
    options = msgspec.structs.replace(
        parse(),
        gpus_command=(python, "-m", "tests.fakes.gpus"),
        mps_command=("no-such-mps-control",) if os.environ.get("FAKE_MPS") == "absent" else (python, "-S", control),
    )
    if os.environ.get("FAKE_BELOW") == "driver":
        below = "tests.predictor.worker"
        options = msgspec.structs.replace(
            options, worker_command=(python, "-m", f"{below}.fake_cuda_worker"), holder_command=(python, "-m", f"{below}.fake_cuda_holder")
        )
    else:
        options = msgspec.structs.replace(
            options,
            worker_command=(python, "-m", "tests.nodeagent.fake_worker"),
            loader_command=(python, "-m", "tests.nodeagent.fake_loader"),
            holder_command=(python, "-m", "tests.fakes.holder"),
        )
    sys.exit(main(options))
