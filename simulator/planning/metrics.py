"""What Prometheus knows of InferenceServices: under which names requests, latencies and GPUs are counted, and whose a series is.

Owns the names of Knative's queue proxy (today OpenTelemetry's: kn_serving_invocation_duration_seconds; before, OpenCensus's: revision_app_request_*),
of KServe's model server (request_predict_seconds), of Sluice's own predictor, and of kube-state-metrics. A series is a function's by its labels.
Missing series are no error while others are there: a function that is scaled to zero has none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from contracts import metrics as names
from contracts.errors import InvalidValue, NotFound
from simulator.planning.prometheus import Floats, Prometheus, Series, Window

_NAMESPACES = ("k8s_namespace_name", "namespace_name", "namespace", "kubernetes_namespace", "exported_namespace")
_NAMES = (
    "function",
    "inferenceservice",
    "isvc",
    "serving_kserve_io_inferenceservice",
    "label_serving_kserve_io_inferenceservice",
    "kn_service_name",
    "kn_configuration_name",
    "configuration_name",
    "service_name",
    "service",
    "model_name",
)
_SUFFIXES = ("", "-predictor", "-predictor-default")
"""KServe's names for the Knative Service of an InferenceService, now and before 0.11."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where requests are counted: a counter of requests, and a histogram of their latencies in units of `unit_s`; `by` tells the functions apart."""

    counter: str
    latency: str
    by: tuple[str, ...]
    unit_s: float = 1.0

    def rate(self, window_s: int) -> str:
        """Requests a second."""
        return f"sum by ({', '.join(self.by)}) (rate({self.counter}[{window_s}s]))"

    def latency_s(self, window_s: int) -> str:
        """Mean latency in seconds; nan where there was no request."""
        parts = [f"sum by ({', '.join(self.by)}) (rate({self.latency}_{part}[{window_s}s]))" for part in ("sum", "count")]
        return f"{self.unit_s:g} * {parts[0]} / {parts[1]}"


SOURCES: Mapping[str, Source] = {
    "sluice": Source(f"{names.REQUEST_SECONDS}_count", names.REQUEST_SECONDS, ("function",)),
    "knative": Source(
        "kn_serving_invocation_duration_seconds_count",
        "kn_serving_invocation_duration_seconds",
        ("k8s_namespace_name", "namespace", "kn_configuration_name"),
    ),
    "knative-opencensus": Source(
        "revision_app_request_count", "revision_app_request_latencies", ("namespace_name", "namespace", "configuration_name"), 0.001
    ),
    "kserve": Source("request_predict_seconds_count", "request_predict_seconds", ("namespace", "kubernetes_namespace", "model_name")),
}
_GPUS = (
    'sum by (namespace, pod) (kube_pod_container_resource_requests{resource="nvidia_com_gpu"}'
    ' * on (namespace, pod) group_left () max by (namespace, pod) (kube_pod_status_phase{phase="Running"} == 1))'
)


@dataclass(frozen=True, slots=True)
class Asked:
    """What the user chose: one of SOURCES or "auto", or queries of their own, in which $window stands for the range of a rate."""

    source: str = "auto"
    rate: str = ""
    latency: str = ""


@dataclass(frozen=True, slots=True)
class Observed:
    """Requests a second by function and step (functions without a series: 0), the source that told, and who had no series."""

    per_s: Floats
    source: str
    silent: tuple[str, ...] = field(default=())


def rates(server: Prometheus, keys: Sequence[str], window: Window, asked: Asked) -> Observed:
    """The rates of all functions; NotFound names the queries that knew none of them, and whom they knew."""
    tried: list[str] = []
    for source, query in _rate_queries(asked, 2 * window.step_s):
        series = server.query_range(query, window)
        found = _by_function(series, keys)
        if found:
            per_s = np.array([_total(found.get(key, ()), window) for key in keys])
            if (per_s < 0).any():
                raise InvalidValue(f"the query {query!r} gave a rate below 0")
            return Observed(per_s, source, tuple(key for key in keys if key not in found))
        tried.append(f"{query!r} ({_whom(series)})")
    raise NotFound(f"{server.url} has no rates of {', '.join(keys[:5])}{', ...' if len(keys) > 5 else ''} in this range: asked {'; '.join(tried)}")


def latencies(server: Prometheus, keys: Sequence[str], window: Window, asked: Asked, source: str) -> dict[str, Floats]:
    """Mean latencies in ms of each function's steps with requests (ascending), where there are any."""
    query = _filled(asked.latency, 2 * window.step_s) or SOURCES[source].latency_s(2 * window.step_s)
    found = {}
    for key, series in _by_function(server.query_range(query, window), keys).items():
        values = np.concatenate([one.floats for one in series])
        values = np.sort(values[np.isfinite(values) & (values > 0)]) * 1000
        if len(values):
            found[key] = values
    return found


def gpus(server: Prometheus, keys: Sequence[str], window: Window) -> dict[str, Floats]:
    """Whole GPUs that the functions' pods held, by step; empty when the server knows no pods with GPUs."""
    pods = {key: (key.partition("/")[0], f"{key.partition('/')[2]}-predictor-") for key in keys}
    found: dict[str, list[Series]] = {}
    for series in server.query_range(_GPUS, window):
        namespace, pod = series.labels.get("namespace", ""), series.labels.get("pod", "")
        fitting = [key for key, (where, prefix) in pods.items() if where == namespace and pod.startswith(prefix)]
        if fitting:
            found.setdefault(max(fitting, key=len), []).append(series)
    return {key: _total(series, window) for key, series in found.items()}


def _rate_queries(asked: Asked, window_s: int) -> list[tuple[str, str]]:
    if asked.rate:
        return [("query", _filled(asked.rate, window_s))]
    if asked.source == "auto":
        return [(name, source.rate(window_s)) for name, source in SOURCES.items()]
    return [(asked.source, SOURCES[asked.source].rate(window_s))]


def _filled(query: str, window_s: int) -> str:
    return query.replace("$window", f"{window_s}s")


def _by_function(series: Iterable[Series], keys: Sequence[str]) -> dict[str, list[Series]]:
    """The series of each function: by name, and by namespace where a label tells it."""
    names_of = {f"{key.partition('/')[2]}{suffix}": key.partition("/")[2] for key in keys for suffix in reversed(_SUFFIXES)}
    known = {name: [key for key in keys if key.partition("/")[2] == name] for name in names_of.values()}
    found: dict[str, list[Series]] = {}
    for one in series:
        said = next((one.labels[label] for label in _NAMES if one.labels.get(label)), "")
        namespace, _, name = said.rpartition("/")
        namespace = namespace or next((one.labels[label] for label in _NAMESPACES if one.labels.get(label)), "")
        fitting = [key for key in known.get(names_of.get(name, ""), ()) if not namespace or key.partition("/")[0] == namespace]
        if len(fitting) > 1:
            raise InvalidValue(f"a series {dict(one.labels)} without a namespace may be of {' or '.join(fitting)}: use a query that tells them apart")
        if fitting:
            found.setdefault(fitting[0], []).append(one)
    return found


def _total(series: Iterable[Series], window: Window) -> Floats:
    """The sum over series; a moment without a value counts nothing."""
    total = np.zeros(window.steps)
    for one in series:
        total += np.where(np.isfinite(one.floats), one.floats, 0.0)
    return total


def _whom(series: Sequence[Series]) -> str:
    if not series:
        return "no series"
    labels = ["{" + ", ".join(f'{name}="{value}"' for name, value in one.labels.items()) + "}" for one in series[:3]]
    return f"{len(series)} series of others: {', '.join(labels)}{', ...' if len(series) > 3 else ''}"
