import copy

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from contracts.errors import InvalidFunction
from contracts.functions import Function, FunctionClass, ModelFormat, ModelRef, Share, Slo, from_inference_service
from contracts.units import MS

FULL = {
    "apiVersion": "serving.kserve.io/v1beta1",
    "kind": "InferenceService",
    "metadata": {
        "name": "embed",
        "namespace": "search",
        "annotations": {
            "sluice.dev/slo-latency-ms": "80.5",
            "sluice.dev/slo-percentile": "99.9",
            "sluice.dev/class": "best-effort",
            "sluice.dev/sm-percent": "25",
            "sluice.dev/quota-percent": "12.5",
            "sluice.dev/quota-limit-percent": "50",
            "sluice.dev/max-batch": "16",
            "sluice.dev/timeout-ms": "5000",
            "serving.kserve.io/deploymentMode": "Standard",
        },
    },
    "spec": {"predictor": {"model": {"modelFormat": {"name": "torch-export"}, "runtime": "sluice", "storageUri": "file:///models/embed.pt2"}}},
}


def with_(path, value):
    """FULL with one value changed; None removes it."""
    document = copy.deepcopy(FULL)
    *parents, last = path
    at = document
    for key in parents:
        at = at[key]
    if value is None:
        del at[last]
    else:
        at[last] = value
    return document


def note(name, value):
    return with_(("metadata", "annotations", f"sluice.dev/{name}"), value)


def test_every_annotation_of_a_document_is_read():
    assert from_inference_service(FULL) == Function(
        name="embed",
        namespace="search",
        model=ModelRef(ModelFormat.TORCH_EXPORT, "file:///models/embed.pt2"),
        cls=FunctionClass.BEST_EFFORT,
        share=Share(sm_percent=25, quota_bp=1250, limit_bp=5000),
        slo=Slo(latency_ns=80_500_000, percentile=99.9),
        max_batch=16,
        timeout_ns=5000 * MS,
    )


@pytest.mark.parametrize("annotations", [{}, None, "absent"])
def test_a_document_without_annotations_has_the_defaults(annotations):
    document = copy.deepcopy(FULL)
    del document["metadata"]["namespace"]
    document["metadata"]["annotations"] = annotations
    if annotations == "absent":
        del document["metadata"]["annotations"]
    function = from_inference_service(document)
    assert function == Function("embed", ModelRef(ModelFormat.TORCH_EXPORT, "file:///models/embed.pt2"))
    assert (function.key, function.share, function.slo) == ("default/embed", Share(100, 10, 10_000), Slo(1000 * MS, 98.0))


def test_a_catalogue_model_is_named_by_its_annotation():
    document = note("catalog", "resnet50?seed=3")
    document["spec"]["predictor"]["model"] = {"modelFormat": {"name": "sluice-catalog"}}
    assert from_inference_service(document).model == ModelRef(ModelFormat.CATALOG, "resnet50?seed=3")


def _catalogue(**annotations):
    document = with_(("spec", "predictor", "model"), {"modelFormat": {"name": "sluice-catalog"}})
    document["metadata"]["annotations"] |= annotations
    return document


P = "sluice.dev/"
BAD = {
    "SM of zero": (note("sm-percent", "0"), P + "sm-percent", "0"),
    "SM over a hundred": (note("sm-percent", "101"), P + "sm-percent", "101"),
    "negative SM": (note("sm-percent", "-5"), P + "sm-percent", "-5"),
    "SM in fractions": (note("sm-percent", "12.5"), P + "sm-percent", "12.5"),
    "SM that is no number": (note("sm-percent", "half"), P + "sm-percent", "half"),
    "SM that is no finite number": (note("sm-percent", "inf"), P + "sm-percent", "inf"),
    "SM written as a number, which no cluster takes": (note("sm-percent", 50), P + "sm-percent", 50),
    "quota of zero": (note("quota-percent", "0"), P + "quota-percent", "0"),
    "quota under a hundredth": (note("quota-percent", "0.009"), P + "quota-percent", "0.009"),
    "quota with three decimals": (note("quota-percent", "12.345"), P + "quota-percent", "12.345"),
    "quota over a hundred": (note("quota-percent", "100.01"), P + "quota-percent", "100.01"),
    "negative quota": (note("quota-percent", "-1"), P + "quota-percent", "-1"),
    "quota that is not a number": (note("quota-percent", "nan"), P + "quota-percent", "nan"),
    "quota with a sign of percent": (note("quota-percent", "5%"), P + "quota-percent", "5%"),
    "limit below the quota": (note("quota-limit-percent", "12"), P + "quota-limit-percent", "12"),
    "limit over a hundred": (note("quota-limit-percent", "101"), P + "quota-limit-percent", "101"),
    "unknown class": (note("class", "batch"), P + "class", "batch"),
    "empty class": (note("class", ""), P + "class", ""),
    "negative latency": (note("slo-latency-ms", "-1"), P + "slo-latency-ms", "-1"),
    "latency of zero": (note("slo-latency-ms", "0"), P + "slo-latency-ms", "0"),
    "latency too long for a message": (note("slo-latency-ms", "1e300"), P + "slo-latency-ms", "1e300"),
    "percentile of zero": (note("slo-percentile", "0"), P + "slo-percentile", "0"),
    "percentile of a hundred": (note("slo-percentile", "100"), P + "slo-percentile", "100"),
    "batch of zero": (note("max-batch", "0"), P + "max-batch", "0"),
    "batch too large": (note("max-batch", "1025"), P + "max-batch", "1025"),
    "timeout of zero": (note("timeout-ms", "0"), P + "timeout-ms", "0"),
    "timeout too long for a message": (note("timeout-ms", "1e18"), P + "timeout-ms", "1e18"),
    "misspelt annotation": (note("slo-latency", "80"), P + "slo-latency", "80"),
    "annotations as a list": (with_(("metadata", "annotations"), ["a"]), "metadata.annotations", ["a"]),
    "name with an upper case letter": (with_(("metadata", "name"), "Embed"), "metadata.name", "Embed"),
    "name that is a path": (with_(("metadata", "name"), "../etc"), "metadata.name", "../etc"),
    "name with a trailing line break": (with_(("metadata", "name"), "embed\n"), "metadata.name", "embed\n"),
    "name with a leading dash": (with_(("metadata", "name"), "-embed"), "metadata.name", "-embed"),
    "name of 64 characters": (with_(("metadata", "name"), "a" * 64), "metadata.name", "a" * 64),
    "name that is empty": (with_(("metadata", "name"), ""), "metadata.name", ""),
    "name that is a number": (with_(("metadata", "name"), 7), "metadata.name", 7),
    "name that is missing": (with_(("metadata", "name"), None), "metadata.name", None),
    "namespace with a dot": (with_(("metadata", "namespace"), "a.b"), "metadata.namespace", "a.b"),
    "another kind": (with_(("kind",), "Service"), "apiVersion, kind", ("serving.kserve.io/v1beta1", "Service")),
    "another version": (with_(("apiVersion",), "v1"), "apiVersion, kind", ("v1", "InferenceService")),
    "no metadata": (with_(("metadata",), None), "metadata", None),
    "no spec": (with_(("spec",), None), "spec", None),
    "no predictor": (with_(("spec", "predictor"), None), "spec.predictor", None),
    "a predictor without a model": (with_(("spec", "predictor", "model"), None), "spec.predictor.model", None),
    "no format": (with_(("spec", "predictor", "model", "modelFormat"), None), "spec.predictor.model.modelFormat", None),
    "unknown format": (with_(("spec", "predictor", "model", "modelFormat", "name"), "onnx"), "spec.predictor.model.modelFormat.name", "onnx"),
    "no storage": (with_(("spec", "predictor", "model", "storageUri"), None), "spec.predictor.model.storageUri", None),
    "a catalogue model without its name": (_catalogue(), P + "catalog", None),
    "a document that is a list": ([FULL], "document", [FULL]),
    "an empty document": (None, "document", None),
}


@pytest.mark.parametrize(("document", "key", "value"), BAD.values(), ids=BAD)
def test_a_bad_value_is_named_with_its_key(document, key, value):
    with pytest.raises(InvalidFunction) as caught:
        from_inference_service(document)
    assert (caught.value.key, caught.value.value) == (key, value)
    assert str(caught.value).startswith(f"{key}: ")
    assert repr(value)[:100] in str(caught.value)


GOOD_EDGES = {
    "the smallest share": (note("quota-percent", "0.01"), lambda f: f.share.quota_bp == 1),
    "the whole of the time": (note("quota-percent", "50"), lambda f: f.share.quota_bp == f.share.limit_bp == 5000),
    "one percent of the SMs": (note("sm-percent", "1"), lambda f: f.share.sm_percent == 1),
    "a name of 63 characters": (with_(("metadata", "name"), "a" * 63), lambda f: len(f.name) == 63),
    "a name of one digit": (with_(("metadata", "name"), "7"), lambda f: f.name == "7"),
    "a foreign annotation of any kind": (with_(("metadata", "annotations", "example.com/x"), 5), lambda f: f.name == "embed"),
}


@pytest.mark.parametrize(("document", "holds"), GOOD_EDGES.values(), ids=GOOD_EDGES)
def test_values_at_the_edge_are_taken(document, holds):
    assert holds(from_inference_service(document))


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ((0, 10), "sm-percent"),
        ((10**400, 10), "sm-percent"),
        ((True, 10), "sm-percent"),
        ((50, 0.001), "quota-percent"),
        ((50, 60, 59.99), "quota-limit-percent"),
    ],
)
def test_a_share_from_the_command_line_is_held_to_the_same_bounds(arguments, key):
    with pytest.raises(InvalidFunction) as caught:
        Share.of(*arguments)
    assert caught.value.key == key


@given(st.integers(1, 100), st.integers(1, 10_000), st.integers(0, 10_000))
def test_a_share_keeps_every_hundredth_of_a_percent(sm, quota, more):
    limit = min(10_000, quota + more)
    share = Share(sm, quota, limit)
    assert Share.of(share.sm_percent, share.quota_percent, share.limit_percent) == share
    assert Share.of(f"{sm}", f"{quota / 100:.2f}", f"{limit / 100:.2f}") == share
    assert share.area_ppm / 1e6 == pytest.approx(sm / 100 * quota / 10_000)


def test_bad_values_are_refused_also_where_they_arrive_by_wire():
    with pytest.raises(InvalidFunction, match="sm-percent"):
        msgspec.msgpack.decode(msgspec.msgpack.encode({"sm_percent": 0}), type=Share)


LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
TREES = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3), max_leaves=8)
PATHS = st.sampled_from(
    [
        ("apiVersion",),
        ("metadata",),
        ("metadata", "name"),
        ("metadata", "namespace"),
        ("metadata", "annotations"),
        ("metadata", "annotations", "sluice.dev/sm-percent"),
        ("metadata", "annotations", "sluice.dev/quota-percent"),
        ("metadata", "annotations", "sluice.dev/slo-latency-ms"),
        ("metadata", "annotations", "sluice.dev/max-batch"),
        ("spec", "predictor", "model"),
        ("spec", "predictor", "model", "modelFormat"),
        ("spec", "predictor", "model", "storageUri"),
    ]
)


@given(PATHS, TREES | st.text())
def test_any_value_in_any_place_gives_a_function_or_an_error_of_ours(path, value):
    document = with_(path, "placeholder")
    at = document
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    try:
        function = from_inference_service(document)
    except InvalidFunction:
        return
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(function), type=Function) == function
