"""`python -m benchmarks.protocol_parts.echo PORT`: a bare Starlette application that sends bodies back, under uvicorn as the predictor runs it."""

from __future__ import annotations

import sys

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route


async def echo(request: Request) -> Response:
    """The body of the request."""
    return Response(await request.body())


def main() -> None:
    """Serves until SIGTERM."""
    application = Starlette(routes=[Route("/{path:path}", echo, methods=["GET", "POST"])])
    uvicorn.run(application, port=int(sys.argv[1]), loop="uvloop", http="httptools", access_log=False, log_level="warning")


if __name__ == "__main__":
    main()
