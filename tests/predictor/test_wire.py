"""Protobuf messages, split and joined beside protobuf's own parser."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kserve.protocol.grpc import grpc_predict_v2_pb2 as pb

from contracts.errors import InvalidValue
from predictor.protocols import inference_pb2, wire
from predictor.protocols.wire import join, split

TENSORS = st.lists(st.binary(max_size=300), max_size=4)


@given(TENSORS, st.text(max_size=5), st.lists(st.integers(-(2**63), 2**63 - 1), max_size=4))
def test_a_request_is_parsed_as_protobuf_parses_it(raw: list[bytes], name: str, shape: list[int]) -> None:
    request = pb.ModelInferRequest(model_name=name, id="7", raw_input_contents=raw)
    request.inputs.add(name="x", datatype="FP32", shape=shape)
    request.parameters["p"].int64_param = -1
    message = request.SerializeToString()
    rest, values = split(message, 7)
    assert [bytes(value) for value in values] == raw
    whole = np.frombuffer(message, np.uint8)
    assert all(np.shares_memory(np.frombuffer(value, np.uint8), whole) for value in values if value.nbytes)
    parsed = inference_pb2.ModelInferRequest.FromString(rest)
    assert (parsed.model_name, parsed.id, list(parsed.inputs[0].shape), parsed.parameters["p"].int64_param) == (name, "7", shape, -1)


@given(TENSORS)
def test_an_answer_is_what_protobuf_would_have_written(raw: list[bytes]) -> None:
    answer = inference_pb2.ModelInferResponse(model_name="m", id="7")
    answer.outputs.add(name="y", datatype="FP32", shape=[1, 2])
    joined = pb.ModelInferResponse.FromString(join(answer.SerializeToString(), 6, map(memoryview, raw)))
    assert list(joined.raw_output_contents) == raw
    assert (joined.model_name, joined.id, list(joined.outputs[0].shape)) == ("m", "7", [1, 2])


TORN = {
    "a field without its length": b"\x3a",
    "a length without its bytes": b"\x3a\x05abc",
    "an endless number": b"\x08" + b"\xff" * 12,
    "a group": b"\x0b",
    "half a double": b"\x09\x00",
}


@pytest.mark.parametrize("message", TORN.values(), ids=TORN)
def test_a_torn_message_is_refused(message: bytes) -> None:
    with pytest.raises(InvalidValue):
        split(message, 7)


@settings(max_examples=300)
@given(st.binary(max_size=60))
def test_no_bytes_give_anything_but_parts_or_an_error(message: bytes) -> None:
    try:
        rest, values = wire.split(message, 7)
    except InvalidValue:
        return
    assert len(rest) + sum(value.nbytes for value in values) <= len(message)
