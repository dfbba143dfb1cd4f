"""`python -m predictor`: the KServe front of one or many functions. Reads the command line; everything else is in `predictor.server`."""

from __future__ import annotations

import argparse
import os
import sys

from contracts.units import MIB, parse_bytes
from predictor.logs import configure
from predictor.protocols.limits import Limits
from predictor.server import Settings, serve


def main(argv: list[str] | None = None) -> int:
    """Serves until SIGTERM or SIGINT; 0 after a clean drain."""
    parser = argparse.ArgumentParser(prog="python -m predictor", description="KServe's V1, V2 and gRPC protocols for the functions of a node agent.")
    parser.add_argument("--agent", required=True, metavar="PATH", help="the node agent's agent.sock")
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen on (default: %(default)s)")
    parser.add_argument("--http-port", type=int, required=True, metavar="N", help="0 takes a free port; the log says which")
    parser.add_argument("--grpc-port", type=int, metavar="N", help="no gRPC without it")
    parser.add_argument("--segment-bytes", type=parse_bytes, default=256 * MIB, metavar="BYTES", help="shared memory for tensors (default: 256Mi)")
    parser.add_argument("--max-body-bytes", type=parse_bytes, default=64 * MIB, metavar="BYTES", help="the largest request body (default: 64Mi)")
    parser.add_argument("--linger-ms", type=int, default=0, metavar="MS", help="serve this long after readiness turned false at SIGTERM (default: 0)")
    parser.add_argument(
        "--max-connections", type=int, default=1024, metavar="N", help="HTTP connections, and gRPC calls, at a time (default: %(default)s)"
    )
    parser.add_argument(
        "--patience-s", type=float, default=20, metavar="S", help="how long a client may stand still while it sends or reads (default: %(default)s)"
    )
    parser.add_argument("--keep-alive-s", type=float, default=75, metavar="S", help="how long a connection may be idle (default: %(default)s)")
    parser.add_argument(
        "--log-format", choices=["text", "json"], default="text", help="how lines are written to standard error (default: %(default)s)"
    )
    parser.add_argument("--access-log", type=float, default=0, metavar="N", help="a line for each request, at most N a second (default: 0, none)")
    parser.add_argument("--traces", default="", metavar="NAME", help="OpenTelemetry's exporter (otlp, console), set up by its OTEL_* variables")
    options = parser.parse_args(argv)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # else each call starts a thread for every core of the node
    configure(options.log_format)
    return serve(
        Settings(
            agent_path=options.agent,
            host=options.host,
            http_port=options.http_port,
            grpc_port=options.grpc_port,
            segment_bytes=options.segment_bytes,
            linger_ms=options.linger_ms,
            limits=Limits(
                max_connections=options.max_connections,
                patience_s=options.patience_s,
                keep_alive_s=options.keep_alive_s,
                body_bytes=options.max_body_bytes,
            ),
            traces=options.traces,
            access_log_per_s=options.access_log,
        )
    )


if __name__ == "__main__":
    sys.exit(main())
