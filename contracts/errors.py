"""Every error that crosses a boundary, in one tree.

SluiceError
├── InvalidValue          a value from outside is wrong: `key` names it, `value` shows it        -> 400
│   ├── InvalidFunction   an InferenceService document that cannot become a function
│   ├── InvalidArtifact   a model file that is broken, truncated, foreign or would execute code
│   └── InvalidTensor     a request's tensor has the wrong name, dtype, shape or bytes
├── NotFound              no such function                                                        -> 404
├── NotPermitted          the peer does not own that function                                     -> 403
├── Refused               accepted nothing: try again later (`retry_after_ms`)                    -> 429
├── Unavailable           the function cannot be served now: loading, lane lost, no capacity      -> 503
├── DeadlineExceeded      the request's own deadline passed first                                 -> 504
├── ProtocolError         a peer sent a frame that is malformed, too long or out of order
└── ExecutionError        the model itself failed on this input                                   -> 500

The codes at the right are applied in `predictor/protocols/codes.py` and nowhere else. On the wire an error is (kind, message, retry_after_ms);
`to_wire` and `from_wire` are the two directions.
"""

from __future__ import annotations

_MAX_VALUE_CHARS = 200
_MAX_MESSAGE_CHARS = 4000


class SluiceError(Exception):
    """The root. The message says what was wrong, with the value, and what to do."""

    def __init__(self, message: str, *, retry_after_ms: int = 0) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after_ms = retry_after_ms


class InvalidValue(SluiceError):
    """A value from outside is wrong."""

    def __init__(self, message: str, *, key: str = "", value: object = None, retry_after_ms: int = 0) -> None:
        super().__init__(f"{key}: {message}, got {_short(repr(value), _MAX_VALUE_CHARS)}" if key else message, retry_after_ms=retry_after_ms)
        self.reason = message
        self.key = key
        self.value = value


class InvalidFunction(InvalidValue):
    """An InferenceService document cannot become a function."""


class InvalidArtifact(InvalidValue):
    """A model file is broken, truncated, foreign, or would execute code."""


class InvalidTensor(InvalidValue):
    """A request's tensor has the wrong name, dtype, shape or size."""


class NotFound(SluiceError):
    """No such function."""


class NotPermitted(SluiceError):
    """The peer does not own what it asked for."""


class Refused(SluiceError):
    """Admission control said no; nothing was queued. `retry_after_ms` says when to try again."""


class Unavailable(SluiceError):
    """The function cannot be served now; another try may succeed."""


class DeadlineExceeded(SluiceError):
    """The request's own deadline passed before its answer was ready."""


class ProtocolError(SluiceError):
    """A peer sent a frame that is malformed, too long or out of order."""


class ExecutionError(SluiceError):
    """The model failed on this input."""


_KINDS: dict[str, type[SluiceError]] = {
    kind.__name__: kind
    for kind in (
        SluiceError,
        InvalidValue,
        InvalidFunction,
        InvalidArtifact,
        InvalidTensor,
        NotFound,
        NotPermitted,
        Refused,
        Unavailable,
        DeadlineExceeded,
        ProtocolError,
        ExecutionError,
    )
}


def to_wire(error: BaseException) -> tuple[str, str, int]:
    """(kind, message, retry_after_ms) of any error; one from outside the tree becomes an ExecutionError that names its type.

    The message is cut so that it always fits a frame, whatever a peer made it quote.
    """
    if isinstance(error, SluiceError):
        return type(error).__name__, _short(error.message, _MAX_MESSAGE_CHARS), error.retry_after_ms
    return "ExecutionError", _short(f"{type(error).__name__}: {error}", _MAX_MESSAGE_CHARS), 0


def from_wire(kind: str, message: str, retry_after_ms: int = 0) -> SluiceError:
    """The error again; an unknown kind (a newer peer) becomes the root."""
    return _KINDS.get(kind, SluiceError)(message, retry_after_ms=retry_after_ms)


def _short(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text)} characters)"
