"""Whatever a predictor might send on agent.sock, for hypothesis to draw from: good submits, submits of all kinds of nonsense, cancels."""

from __future__ import annotations

from hypothesis import strategies as st

from contracts.wire import Cancel, Part, Submit, TensorRef

SEGMENT = 1 << 20
REF = TensorRef("features", "FP32", (1, 16), 0, 64)
INTS = st.one_of(st.integers(-2, 40), st.integers(-(2**63), 2**64 - 1))
NAMES = st.sampled_from(["default/mine", "default/others", "default/ghost", "", "../mine", "default/mine\0", "mine"])
TENSORS = st.builds(
    TensorRef,
    st.sampled_from(["features", "scores", "", "../features"]),
    st.sampled_from(["FP32", "INT32", "FP64", "BYTES", ""]),
    st.one_of(st.just((1, 16)), st.just((1, 4)), st.lists(INTS, max_size=4).map(tuple)),
    st.one_of(st.sampled_from([0, 64, 128, SEGMENT - 64]), INTS),
    st.one_of(st.sampled_from([64, 16]), INTS),
)
PARTS = st.builds(Part, st.one_of(st.just(1), INTS), st.lists(TENSORS, max_size=2).map(tuple), st.lists(TENSORS, max_size=2).map(tuple))
SUBMITS = st.builds(Submit, st.integers(0, 6), NAMES, st.lists(PARTS, max_size=3).map(tuple), INTS, INTS)
GOOD = st.builds(
    Submit,
    st.integers(0, 6),
    st.just("default/mine"),
    st.just((Part(1, (REF,), (TensorRef("scores", "FP32", (1, 4), 64, 16),)),)),
    st.just(2**62),
    st.just(2**62),
)
MESSAGES = st.one_of(GOOD, SUBMITS, st.builds(Cancel, st.integers(0, 6)))
