"""What an error is called on the wire: the one table from `contracts.errors` to HTTP and gRPC codes.

Knows no request and no server.
"""

from __future__ import annotations

from grpc import StatusCode  # type: ignore[import-untyped]

from contracts.errors import DeadlineExceeded, InvalidValue, NotFound, NotPermitted, Refused, SluiceError, Unavailable


class BodyTooLarge(InvalidValue):
    """The body is larger than this server takes."""


_CODES: tuple[tuple[type[SluiceError], int, StatusCode], ...] = (
    (BodyTooLarge, 413, StatusCode.INVALID_ARGUMENT),
    (InvalidValue, 400, StatusCode.INVALID_ARGUMENT),
    (NotFound, 404, StatusCode.NOT_FOUND),
    (NotPermitted, 403, StatusCode.PERMISSION_DENIED),
    (Refused, 429, StatusCode.RESOURCE_EXHAUSTED),
    (Unavailable, 503, StatusCode.UNAVAILABLE),
    (DeadlineExceeded, 504, StatusCode.DEADLINE_EXCEEDED),
    (SluiceError, 500, StatusCode.INTERNAL),
)


def codes(error: SluiceError) -> tuple[int, StatusCode, dict[str, str]]:
    """HTTP code, gRPC code, and a Retry-After in whole seconds where another try may succeed."""
    http, status = next((http, status) for kind, http, status in _CODES if isinstance(error, kind))
    return http, status, {"retry-after": str(max(1, -(-error.retry_after_ms // 1000)))} if http in (429, 503) else {}
