"""What the clients know of the node: its functions and their tensors. Imports no client, so that each stays alone in its process."""

from __future__ import annotations

import ml_dtypes
import numpy as np

IDENTITY, SEVERAL, DATATYPES_MODEL, TEXT, SPARE = "identity", "several", "datatypes", "minilm", "spare"
FUNCTIONS = {IDENTITY, SEVERAL, DATATYPES_MODEL, TEXT, SPARE}

DATATYPES = ("BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64", "FP16", "BF16", "FP32", "FP64")
_NUMPY = {"BOOL": np.bool_, "FP16": np.float16, "BF16": ml_dtypes.bfloat16, "FP32": np.float32, "FP64": np.float64}


def extremes(datatype: str) -> np.ndarray:
    """[2, 3] values of a datatype, its least and greatest among them."""
    kind = np.dtype(_NUMPY.get(datatype) or datatype.lower())
    if kind == np.bool_:
        return np.array([[True, False, True], [False, False, True]])
    info = np.iinfo(kind) if kind.kind in "iu" else ml_dtypes.finfo(kind)
    return np.array([[info.min, info.max, 0], [1, 2, 3]], kind)


LEFT = np.array([[0.5, -1.5, 2.25, -0.0]], np.float32)
RIGHT = np.array([[1, 2, -3, 4]], np.int64)
SUM, DOUBLE, POSITIVE = LEFT + RIGHT.astype(np.float32), RIGHT * 2, LEFT > 0
SENTENCES = ["a quick brown fox", "jumps", "over the lazy dog, and then over Žluťoučký kůň"]
