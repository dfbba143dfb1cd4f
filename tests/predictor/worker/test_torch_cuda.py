"""What of the real driver seam needs no GPU: which failures a lane may live on after."""

from __future__ import annotations

import pytest
import torch

from predictor.worker.devices.torch_cuda import TorchCuda


class Answering(TorchCuda):
    """One whose device answers, or does not."""

    def __init__(self, answers: bool) -> None:
        self._answers = answers

    def alive(self) -> bool:
        return self._answers


def cuda_error(code: int) -> BaseException:
    error = torch.AcceleratorError("CUDA error")
    error.error_code = code  # type: ignore[attr-defined]
    return error


FAILURES = {
    "an error of the model": (ValueError("shape"), True),
    "too little memory, as torch says it": (torch.OutOfMemoryError("17 GiB"), True),
    "too little memory, as CUDA says it": (cuda_error(2), True),
    "a call that a capture does not allow": (cuda_error(900), True),
    "a capture that was broken": (cuda_error(901), True),
    "an illegal address": (cuda_error(700), False),
    "an assertion on the device": (cuda_error(710), False),
    "a launch that failed": (cuda_error(719), False),
    "a lost MPS server": (cuda_error(807), False),
}


@pytest.mark.parametrize(("failure", "survived"), FAILURES.values(), ids=FAILURES)
def test_a_lane_lives_on_after_what_is_not_its_context_s_end(failure: BaseException, survived: bool) -> None:
    assert Answering(True).survives(failure) is survived
    assert not Answering(False).survives(failure)
