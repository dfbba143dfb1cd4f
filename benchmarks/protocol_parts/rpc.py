"""gRPC requests as the bytes of KServe's messages, and what an answer's bytes hold."""

from __future__ import annotations

import numpy as np
from kserve.protocol.grpc.grpc_predict_v2_pb2 import ModelInferRequest, ModelInferResponse

from benchmarks.protocol_parts.messages import ID, INPUT, Values

SERVICE = "/inference.GRPCInferenceService"
INFER = f"{SERVICE}/ModelInfer"


def request(name: str, values: Values, *, typed: bool = False) -> bytes:
    """A ModelInferRequest, its tensor in raw_input_contents or, `typed`, in fp32_contents."""
    message = ModelInferRequest(model_name=name, id=ID)
    tensor = message.inputs.add(name=INPUT, datatype="FP32", shape=values.shape)
    if typed:
        tensor.contents.fp32_contents.extend(values.ravel().tolist())
    else:
        message.raw_input_contents.append(values.tobytes())
    return bytes(message.SerializeToString())


def answer(message: bytes) -> Values:
    """The one output of a ModelInferResponse."""
    response = ModelInferResponse.FromString(message)
    return np.frombuffer(response.raw_output_contents[0], np.float32).reshape(response.outputs[0].shape)
