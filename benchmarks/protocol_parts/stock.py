"""`python -m benchmarks.protocol_parts.stock HTTP_PORT GRPC_PORT`: the stock `kserve.ModelServer` with an identity model, its logging quiet.

The model does as little as KServe lets a model do: JSON values go through as they are, binary ones by numpy.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

import kserve
from kserve import InferOutput, InferRequest, InferResponse

from benchmarks.protocol_parts.messages import IDENTITY, OUTPUT


class Identity(kserve.Model):  # type: ignore[misc]
    """Answers every request with its inputs."""

    def load(self) -> bool:
        """Nothing to load."""
        self.ready = True
        return True

    async def predict(self, payload: Any, headers: dict[str, str] | None = None, response_headers: dict[str, str] | None = None) -> Any:
        """V1 documents and V2 requests."""
        if not isinstance(payload, InferRequest):
            return {"predictions": payload["instances"]}
        given = payload.inputs[0]
        output = InferOutput(OUTPUT, given.shape, given.datatype, given.data)
        if payload.from_grpc or payload.use_binary_outputs:
            output.set_data_from_numpy(given.as_numpy(), binary_data=True)
        return InferResponse(
            payload.id, self.name, [output], use_binary_outputs=payload.use_binary_outputs, requested_outputs=payload.request_outputs
        )


def main() -> None:
    """Serves until SIGTERM."""
    http_port, grpc_port = map(int, sys.argv[1:])
    model = Identity(IDENTITY)
    model.load()
    server = kserve.ModelServer(http_port=http_port, grpc_port=grpc_port, enable_latency_logging=False)
    for name in ("kserve", "kserve.trace", "uvicorn", "uvicorn.access", "uvicorn.error"):
        logging.getLogger(name).setLevel(logging.WARNING)
    server.start([model])


if __name__ == "__main__":
    main()
