"""What a function is: its share, class and objective, read from an InferenceService document.

Owns the words `Share`, `FunctionClass`, `Slo`, `ModelRef` and `Function`, and the one place where annotations become values. Reads documents only;
it never touches files, sockets or a cluster. A wrong value raises InvalidFunction with the document's own key and the value.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec

from contracts.errors import InvalidFunction
from contracts.units import MS, WHOLE_QUOTA_BP

PREFIX = "sluice.dev/"
API_VERSION = "serving.kserve.io/v1beta1"
DEFAULT_NAMESPACE = "default"
MAX_NS = 86_400_000 * MS
"""The longest latency or timeout, so that every deadline fits a message."""
E = TypeVar("E", bound=enum.StrEnum)
_DNS_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")


class FunctionClass(enum.StrEnum):
    """Which tenants wait for which: best-effort work gives way to latency-sensitive work."""

    LATENCY_SENSITIVE = "latency-sensitive"
    BEST_EFFORT = "best-effort"


class ModelFormat(enum.StrEnum):
    """How a model's files are read (`spec.predictor.model.modelFormat.name`)."""

    TORCH_EXPORT = "torch-export"
    TORCHSCRIPT = "torchscript"
    SAFETENSORS = "safetensors"
    CATALOG = "sluice-catalog"


class Share(msgspec.Struct, frozen=True, order=True):
    """A rectangle of a GPU: `sm_percent` of its SMs for `quota_bp` hundredths of a percent of the time; spare time is borrowed up to `limit_bp`."""

    sm_percent: int = 100
    quota_bp: int = 10
    limit_bp: int = WHOLE_QUOTA_BP

    def __post_init__(self) -> None:
        if not 1 <= self.sm_percent <= 100:
            raise InvalidFunction("must be a whole percent from 1 to 100", key="sm-percent", value=self.sm_percent)
        if not 1 <= self.quota_bp <= WHOLE_QUOTA_BP:
            raise InvalidFunction("must be from 0.01 to 100", key="quota-percent", value=self.quota_bp / 100)
        if not self.quota_bp <= self.limit_bp <= WHOLE_QUOTA_BP:
            raise InvalidFunction(f"must be from the quota ({self.quota_percent:g}) to 100", key="quota-limit-percent", value=self.limit_bp / 100)

    @property
    def quota_percent(self) -> float:
        """The guaranteed part of the time, in percent."""
        return self.quota_bp / 100

    @property
    def limit_percent(self) -> float:
        """The greatest part of the time, borrowed time included, in percent."""
        return self.limit_bp / 100

    @property
    def area_ppm(self) -> int:
        """The guaranteed fraction of a GPU, in millionths: what is paid for."""
        return self.sm_percent * self.quota_bp

    @classmethod
    def of(cls, sm_percent: object, quota_percent: object, limit_percent: object = 100) -> Share:
        """A share from the percent values that people write (numbers or text)."""
        return cls(
            sm_percent=_whole(sm_percent, "sm-percent"),
            quota_bp=_basis_points(quota_percent, "quota-percent"),
            limit_bp=_basis_points(limit_percent, "quota-limit-percent"),
        )


class Slo(msgspec.Struct, frozen=True):
    """A latency objective: `percentile` of requests are answered within `latency_ns`."""

    latency_ns: int = 1000 * MS
    percentile: float = 98.0

    def __post_init__(self) -> None:
        if not 0 < self.latency_ns <= MAX_NS:
            raise InvalidFunction("must be greater than 0, and a day at most", key="slo-latency-ms", value=self.latency_ns / MS)
        if not 0 < self.percentile < 100:
            raise InvalidFunction("must lie between 0 and 100", key="slo-percentile", value=self.percentile)


class ModelRef(msgspec.Struct, frozen=True):
    """Where a model comes from: a URI (`file:///models/a.pt2`) or, for the catalogue, a name with options (`resnet50?seed=3`)."""

    format: ModelFormat
    source: str


class Function(msgspec.Struct, frozen=True):
    """One served model with its SLO, class and share."""

    name: str
    model: ModelRef
    namespace: str = DEFAULT_NAMESPACE
    cls: FunctionClass = FunctionClass.LATENCY_SENSITIVE
    share: Share = Share()
    slo: Slo = Slo()
    max_batch: int = 8
    timeout_ns: int = 30_000 * MS

    def __post_init__(self) -> None:
        for key, value in (("metadata.name", self.name), ("metadata.namespace", self.namespace)):
            if not _DNS_LABEL.fullmatch(value):
                raise InvalidFunction("must be a DNS label (a-z, 0-9, '-', at most 63)", key=key, value=value)
        if not 1 <= self.max_batch <= 1024:
            raise InvalidFunction("must be from 1 to 1024", key="max-batch", value=self.max_batch)
        if not 0 < self.timeout_ns <= MAX_NS:
            raise InvalidFunction("must be greater than 0, and a day at most", key="timeout-ms", value=self.timeout_ns / MS)

    @property
    def key(self) -> str:
        """The function's identity on a node: `namespace/name`."""
        return f"{self.namespace}/{self.name}"


def from_inference_service(document: object) -> Function:
    """A function from an InferenceService document (a parsed YAML mapping).

    Annotations read, all under `sluice.dev/`: slo-latency-ms, slo-percentile, class, sm-percent, quota-percent, quota-limit-percent, max-batch,
    timeout-ms, catalog. An unknown annotation under the prefix is an error, so that a typing mistake never silently means a default.
    """
    root = _mapping(document, "document")
    if root.get("apiVersion") != API_VERSION or root.get("kind") != "InferenceService":
        raise InvalidFunction(f"must be {API_VERSION} InferenceService", key="apiVersion, kind", value=(root.get("apiVersion"), root.get("kind")))
    metadata = _mapping(root.get("metadata"), "metadata")
    model = _mapping(_mapping(_mapping(root.get("spec"), "spec").get("predictor"), "spec.predictor").get("model"), "spec.predictor.model")
    notes = _annotations(metadata)
    try:
        return _function(metadata, model, notes)
    except InvalidFunction as error:
        if error.key in _KNOWN:
            raise InvalidFunction(error.reason, key=PREFIX + error.key, value=notes.get(error.key, error.value)) from None
        raise


def _function(metadata: Mapping[str, Any], model: Mapping[str, Any], notes: Mapping[str, str]) -> Function:
    defaults = Share()
    return Function(
        name=_text(metadata.get("name"), "metadata.name"),
        namespace=_text(metadata.get("namespace", DEFAULT_NAMESPACE), "metadata.namespace"),
        model=_model(model, notes),
        cls=_choice(FunctionClass, notes.get("class", FunctionClass.LATENCY_SENSITIVE), "class"),
        share=Share.of(
            notes.get("sm-percent", defaults.sm_percent),
            notes.get("quota-percent", defaults.quota_percent),
            notes.get("quota-limit-percent", defaults.limit_percent),
        ),
        slo=Slo(
            latency_ns=round(_number(notes.get("slo-latency-ms", 1000), "slo-latency-ms") * MS),
            percentile=_number(notes.get("slo-percentile", 98), "slo-percentile"),
        ),
        max_batch=_whole(notes.get("max-batch", 8), "max-batch"),
        timeout_ns=round(_number(notes.get("timeout-ms", 30_000), "timeout-ms") * MS),
    )


_KNOWN = frozenset(
    ("slo-latency-ms", "slo-percentile", "class", "sm-percent", "quota-percent", "quota-limit-percent", "max-batch", "timeout-ms", "catalog")
)


def _annotations(metadata: Mapping[str, Any]) -> dict[str, str]:
    found = {}
    annotations = metadata.get("annotations")
    for key, value in ({} if annotations is None else _mapping(annotations, "metadata.annotations")).items():
        if isinstance(key, str) and key.startswith(PREFIX):
            if key.removeprefix(PREFIX) not in _KNOWN:
                raise InvalidFunction(f"is no annotation of Sluice (known: {', '.join(sorted(_KNOWN))})", key=key, value=value)
            found[key.removeprefix(PREFIX)] = _text(value, key)
    return found


def _model(model: Mapping[str, Any], notes: Mapping[str, str]) -> ModelRef:
    key = "spec.predictor.model.modelFormat.name"
    format_ = _choice(ModelFormat, _mapping(model.get("modelFormat"), "spec.predictor.model.modelFormat").get("name"), key)
    if format_ is ModelFormat.CATALOG:
        return ModelRef(format_, _text(notes.get("catalog"), "catalog"))
    return ModelRef(format_, _text(model.get("storageUri"), "spec.predictor.model.storageUri"))


def _mapping(value: object, key: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise InvalidFunction("must be a mapping", key=key, value=value)
    return value


def _text(value: object, key: str) -> str:
    if not isinstance(value, str) or not value:
        raise InvalidFunction("must be text and not empty", key=key, value=value)
    return value


def _number(value: object, key: str) -> float:
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        number = float("nan")
    if isinstance(value, bool) or not abs(number) < float("inf"):
        raise InvalidFunction("must be a number", key=key, value=value)
    return number


def _whole(value: object, key: str) -> int:
    number = _number(value, key)
    if number != int(number):
        raise InvalidFunction("must be a whole number", key=key, value=value)
    return int(number)


def _basis_points(value: object, key: str) -> int:
    points = _number(value, key) * 100
    if abs(points - round(points)) > 1e-6:
        raise InvalidFunction("must have at most two decimals", key=key, value=value)
    return round(points)


def _choice(kind: type[E], value: object, key: str) -> E:
    try:
        return kind(str(value))
    except ValueError:
        raise InvalidFunction(f"must be one of {', '.join(kind)}", key=key, value=value) from None
