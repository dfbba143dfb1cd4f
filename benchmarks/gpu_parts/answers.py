"""Right or wrong: answers beside those of the plain model with the same weights.

Owns the comparison. Bits may differ where a device picks other kernels for the same product, so an answer is right when it is near its reference, and
the references of any two functions must lie much farther from one another than that: weights that were mixed up never pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from predictor.segment import Array

SAME, NEAR, WRONG = "same", "near", "wrong"
NEAR_PART = 5e-3
"""How far a right answer may lie from its reference, in parts of the reference's greatest value."""

Outputs = Mapping[str, Array]


def compare(outputs: Outputs, reference: Outputs) -> str:
    """SAME bit for bit, NEAR, or WRONG."""
    if outputs.keys() != reference.keys() or any(outputs[name].shape != array.shape for name, array in reference.items()):
        return WRONG
    if all(outputs[name].tobytes() == array.tobytes() for name, array in reference.items()):
        return SAME
    return NEAR if distance(outputs, reference) <= NEAR_PART else WRONG


def distance(outputs: Outputs, reference: Outputs) -> float:
    """The greatest difference of any output, in parts of the reference's greatest value; infinite where something is no number."""
    far = [float(np.abs(np.subtract(outputs[name], array)).max() / max(float(np.abs(array).max()), 1e-30)) for name, array in reference.items()]
    return max(value if np.isfinite(value) else np.inf for value in far)


def separation(references: Sequence[Outputs]) -> float:
    """The least distance of two functions' answers to the same input."""
    pairs = ((one, other) for at, one in enumerate(references) for other in references[:at])
    return min((distance(one, other) for one, other in pairs), default=np.inf)
