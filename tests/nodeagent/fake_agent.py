"""A real agent whose loader and fork server are the fakes of this folder."""

from __future__ import annotations

import sys

import msgspec

from nodeagent.__main__ import main
from nodeagent.shell.options import parse

if __name__ == "__main__":
    worker = (sys.executable, "-m", "tests.nodeagent.fake_worker")
    loader = (sys.executable, "-m", "tests.nodeagent.fake_loader")
    sys.exit(main(msgspec.structs.replace(parse(), worker_command=worker, loader_command=loader)))
