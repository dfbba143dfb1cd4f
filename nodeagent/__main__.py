"""`python -m nodeagent`: one node agent in the foreground. SIGTERM and SIGINT end it cleanly; the weight store stays for the next one."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import resource
import signal
import sys

import uvloop

from contracts.errors import SluiceError
from nodeagent.shell import logs
from nodeagent.shell.agent import Agent
from nodeagent.shell.listener import lock_run_dir
from nodeagent.shell.options import Options, parse
from nodeagent.shell.slabs import close_slabs, open_slabs

_GC_ALLOCATIONS = 20_000


async def _serve(options: Options) -> None:
    slabs = await open_slabs(options)
    try:
        agent = Agent(options, slabs)
        # What lives now lives on: collections on the way of a request need not walk it.
        gc.freeze()
        gc.set_threshold(_GC_ALLOCATIONS)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, agent.stop)
        await agent.run()
    finally:
        await close_slabs(slabs)


def main(options: Options) -> int:
    """Serves until a signal; 0 after a clean end, 1 when the agent could not start or its state broke."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    logs.start()
    try:
        lock = lock_run_dir(options.run_dir)
        try:
            uvloop.run(_serve(options))
        finally:
            os.close(lock)
    except (SluiceError, OSError) as error:
        print(f"nodeagent: {error}", file=sys.stderr)
        return 1
    except Exception:
        logging.getLogger("nodeagent").exception("the agent ends")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(parse()))
