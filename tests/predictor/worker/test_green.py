"""Which SMs a green context gets, asked of a driver that only counts."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from contracts.errors import Unavailable
from predictor.worker.devices import green


class Bindings:
    """As cuda.bindings.driver: splits `sms` into groups, of which there may be fewer than fit (`groups`)."""

    CUdevResourceType = SimpleNamespace(CU_DEV_RESOURCE_TYPE_SM=1)
    CUdevice_attribute = SimpleNamespace(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR=75)
    CUgreenCtxCreate_flags = SimpleNamespace(CU_GREEN_CTX_DEFAULT_STREAM=SimpleNamespace(value=1))
    CUstream_flags = SimpleNamespace(CU_STREAM_NON_BLOCKING=SimpleNamespace(value=1))

    def __init__(self, sms: int, major: int, groups: int = 1000, status: int = 0) -> None:
        self.sms, self.major, self.groups, self.status = sms, major, groups, status
        self.chosen: list[int] = []
        self.priority = 0

    def cuDeviceGet(self, ordinal: int) -> tuple[int, int]:
        return 0, ordinal

    def cuDeviceGetAttribute(self, attribute: int, device: int) -> tuple[int, int]:
        return 0, self.major

    def cuDeviceGetDevResource(self, device: int, kind: int) -> tuple[int, SimpleNamespace]:
        return self.status, resource(self.sms)

    def cuDevSmResourceSplitByCount(
        self, wanted: int, whole: SimpleNamespace, flags: int, least: int
    ) -> tuple[int, list[SimpleNamespace], int, object]:
        count = min(wanted, self.groups, whole.sm.smCount // least)
        return 0, [resource(least, number) for number in range(count)], count, resource(self.sms - count * least)

    def cuDevResourceGenerateDesc(self, groups: list[SimpleNamespace], count: int) -> tuple[int, list[SimpleNamespace]]:
        assert len(groups) == count
        self.chosen = [group.number for group in groups]
        return 0, groups

    def cuGreenCtxCreate(self, description: list[SimpleNamespace], device: int, flags: int) -> tuple[int, list[SimpleNamespace]]:
        return 0, description

    def cuGreenCtxStreamCreate(self, context: object, flags: int, priority: int) -> tuple[int, int]:
        self.priority = priority
        return 0, 4711

    def cuGreenCtxGetDevResource(self, context: list[SimpleNamespace], kind: int) -> tuple[int, SimpleNamespace]:
        return 0, resource(sum(group.sm.smCount for group in context))


def resource(sms: int, number: int = 0) -> SimpleNamespace:
    return SimpleNamespace(sm=SimpleNamespace(smCount=sms), number=number)


CASES = {
    "the first groups": (Bindings(132, 9), 0, 32, [0, 1, 2, 3]),
    "groups behind another lane's": (Bindings(132, 9), 32, 16, [4, 5]),
    "groups of two before Hopper": (Bindings(108, 8), 4, 6, [2, 3, 4]),
    "SMs that are in no whole group are passed over": (Bindings(132, 9, groups=15), 104, 24, [12, 13, 14]),
}


@pytest.mark.parametrize(("bindings", "first", "sms", "expected"), CASES.values(), ids=CASES)
def test_a_lane_gets_the_groups_that_it_was_told(
    bindings: Bindings, first: int, sms: int, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", bindings)  # type: ignore[arg-type]
    found = green.split(first, sms, -1)
    assert (found.stream, found.sms, bindings.chosen, bindings.priority) == (4711, sms, expected, -1)


REFUSED = {
    "not a whole group": (Bindings(132, 9), 0, 12, "whole groups"),
    "not at the start of a group": (Bindings(132, 9), 4, 8, "whole groups"),
    "nothing": (Bindings(132, 9), 0, 0, "whole groups"),
    "more than there are": (Bindings(132, 9), 0, 136, "whole groups"),
    "a driver that cannot": (Bindings(132, 9, status=801), 0, 8, "801"),
    "no bindings": (None, 0, 8, "cuda-bindings"),
}


@pytest.mark.parametrize(("bindings", "first", "sms", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_had_is_refused(bindings: Bindings | None, first: int, sms: int, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", bindings)  # type: ignore[arg-type]
    with pytest.raises(Unavailable, match=reason):
        green.split(first, sms, 0)
