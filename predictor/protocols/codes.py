"""What an error is called on the wire: the one table from `contracts.errors` to HTTP and gRPC codes.

Knows no request and no server.
"""

from __future__ import annotations

from enum import IntEnum

from contracts.errors import DeadlineExceeded, InvalidValue, NotFound, NotPermitted, Refused, SluiceError, Unavailable


class Status(IntEnum):
    """The gRPC codes that this server answers with.

    https://grpc.io/docs/guides/status-codes/
    """

    OK = 0
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14


class BodyTooLarge(InvalidValue):
    """The body is larger than this server takes."""


class NotServed(NotFound):
    """What the protocol knows and this server does not do."""


_CODES: tuple[tuple[type[SluiceError], int, Status], ...] = (
    (BodyTooLarge, 413, Status.RESOURCE_EXHAUSTED),
    (InvalidValue, 400, Status.INVALID_ARGUMENT),
    (NotServed, 501, Status.UNIMPLEMENTED),
    (NotFound, 404, Status.NOT_FOUND),
    (NotPermitted, 403, Status.PERMISSION_DENIED),
    (Refused, 429, Status.RESOURCE_EXHAUSTED),
    (Unavailable, 503, Status.UNAVAILABLE),
    (DeadlineExceeded, 504, Status.DEADLINE_EXCEEDED),
    (SluiceError, 500, Status.INTERNAL),
)


def codes(error: SluiceError) -> tuple[int, Status, dict[str, str]]:
    """HTTP code, gRPC code, and a Retry-After in whole seconds where another try may succeed."""
    http, status = next((http, status) for kind, http, status in _CODES if isinstance(error, kind))
    return http, status, {"retry-after": str(max(1, -(-error.retry_after_ms // 1000)))} if http in (429, 503) else {}
