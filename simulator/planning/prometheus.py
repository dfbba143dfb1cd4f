"""Range queries to a Prometheus, or to anything that speaks its API: read-only, GET alone.

Owns the splitting of ranges (a server gives at most 11,000 points of a series), credentials, and errors that name the query. What is asked for is
`simulator.planning.metrics`'s to say.
"""

from __future__ import annotations

import http.client
import json
import ssl
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from contracts.errors import InvalidValue, Unavailable

Floats = npt.NDArray[np.float64]
MOST_POINTS = 10_000
_SHOWN = 300


class Window(msgspec.Struct, frozen=True):
    """Moments that a range query asks for: `steps` of them, `step_s` apart, the last at `end_s` (Unix time)."""

    end_s: int
    step_s: int
    steps: int

    def __post_init__(self) -> None:
        if self.steps < 1 or self.step_s < 1:
            raise InvalidValue("must span at least one step of a second", key="--since, --step", value=(self.steps, self.step_s))

    @property
    def moments(self) -> range:
        """The moments."""
        return range(self.end_s - (self.steps - 1) * self.step_s, self.end_s + 1, self.step_s)


class Series(msgspec.Struct, frozen=True):
    """Labels, and a value for each moment of the window: nan where there is none."""

    labels: Mapping[str, str]
    values: Any

    @property
    def floats(self) -> Floats:
        """The values as an array."""
        return np.asarray(self.values, np.float64)


class _Series(msgspec.Struct):
    metric: dict[str, str]
    values: list[tuple[float, str]]


class _Data(msgspec.Struct):
    resultType: str = ""  # noqa: N815  # Prometheus's own name
    result: list[msgspec.Raw] = []


class _Answer(msgspec.Struct):
    status: str
    data: _Data | None = None
    errorType: str = ""  # noqa: N815  # Prometheus's own name
    error: str = ""


class _Stay(urllib.request.HTTPRedirectHandler):
    """Follows no redirect, which could carry the token elsewhere."""

    def redirect_request(self, *_: Any) -> None:
        return None


class Prometheus:
    """A server at a URL (a path before /api/v1 is kept). The token is read from its file at once; InvalidValue when URL or files are wrong."""

    def __init__(self, url: str, token_file: Path | None = None, ca_file: Path | None = None, timeout_s: float = 60.0) -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query or parts.fragment:
            raise InvalidValue("must be http://HOST:PORT or https://..., without credentials (--token-file)", key="--prometheus", value=_safe(url))
        self.url = url.rstrip("/")
        self._timeout_s = timeout_s
        self._token = _token(token_file)
        handlers: list[urllib.request.BaseHandler] = [_Stay()]
        if parts.scheme == "https":
            handlers.append(urllib.request.HTTPSHandler(context=_tls(ca_file)))
        self._opener = urllib.request.build_opener(*handlers)

    def query_range(self, query: str, window: Window) -> list[Series]:
        """All series of a query, in as many requests as it takes; Unavailable or InvalidValue names the query and what the server said."""
        moments = window.moments
        place = {moment: at for at, moment in enumerate(moments)}
        found: dict[tuple[tuple[str, str], ...], Floats] = {}
        for first in range(0, len(moments), MOST_POINTS):
            part = moments[first : first + MOST_POINTS]
            for series in self._matrix(query, part, window.step_s):
                values = found.setdefault(tuple(sorted(series.metric.items())), np.full(len(moments), np.nan))
                try:
                    for moment, value in series.values:
                        values[place[round(moment)]] = float(value)
                except (KeyError, ValueError, OverflowError) as error:
                    raise InvalidValue(f"{self.url} answered the query {query!r} with moments or values that nobody asked for ({error})") from None
        return [Series(dict(labels), values) for labels, values in found.items()]

    def _matrix(self, query: str, moments: range, step_s: int) -> list[_Series]:
        asked = {"query": query, "start": moments[0], "end": moments[-1], "step": step_s}
        body = self._get(f"{self.url}/api/v1/query_range?{urllib.parse.urlencode(asked)}", query)
        try:
            answer = msgspec.json.decode(body, type=_Answer)
            if answer.status != "success":
                raise InvalidValue(f"{self.url} refused the query {query!r}: {answer.errorType}: {answer.error}")
            if answer.data is None or answer.data.resultType != "matrix":
                raise InvalidValue(f"{self.url} answered the query {query!r} without a matrix of series")
            return [msgspec.json.decode(raw, type=_Series) for raw in answer.data.result]
        except msgspec.MsgspecError as error:
            raise InvalidValue(f"{self.url} does not answer as a Prometheus does ({error}), to the query {query!r}") from None

    def _get(self, url: str, query: str) -> bytes:
        request = urllib.request.Request(url, headers={"Accept": "application/json"})
        if self._token:
            request.add_unredirected_header("Authorization", f"Bearer {self._token}")
        try:
            with self._opener.open(request, timeout=self._timeout_s) as response:
                return bytes(response.read())
        except urllib.error.HTTPError as error:
            kind = InvalidValue if error.code in (400, 422) else Unavailable
            raise kind(f"{self.url} answered {error.code} to the query {query!r}: {_told(error)}") from None
        except (OSError, http.client.HTTPException) as error:
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            raise Unavailable(f"{self.url} cannot be asked ({reason}), for the query {query!r}") from None


def _told(error: urllib.error.HTTPError) -> str:
    """What a server says beside its code, and what to do."""
    if error.code in (401, 403):
        return "it wants other credentials (--token-file)"
    if 300 <= error.code < 400:
        return f"it lies elsewhere: give that address ({error.headers.get('Location', '')[:_SHOWN]})"
    text = error.read(1 << 16)
    try:
        document = json.loads(text)
        return f"{document['errorType']}: {document['error']}"
    except (ValueError, KeyError, TypeError):
        return " ".join(text.decode(errors="replace").split())[:_SHOWN] or error.reason


def _token(path: Path | None) -> str:
    if path is None:
        return ""
    token = path.read_text("utf-8").strip()
    if not token or not token.isascii() or not token.isprintable():
        raise InvalidValue("must hold one line, the token", key="--token-file", value=str(path))
    return token


def _tls(ca_file: Path | None) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=None if ca_file is None else str(ca_file))
    except ssl.SSLError as error:
        raise InvalidValue(f"holds no certificates ({error})", key="--ca-file", value=str(ca_file)) from None


def _safe(url: str) -> str:
    """Without a password."""
    return url.rpartition("@")[2]
