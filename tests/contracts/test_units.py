import pytest
from hypothesis import given
from hypothesis import strategies as st

from contracts.units import format_bytes, ms, parse_bytes

SIZES = {
    "512Mi": 512 << 20,
    "2G": 2 * 10**9,
    "1.5Gi": 3 << 29,
    "1073741824": 1 << 30,
    " 10 Ki ": 10240,
    "4KiB": 4096,
    "3 MB": 3_000_000,
    "0": 0,
    "1T": 10**12,
    "1Ti": 1 << 40,
}


@pytest.mark.parametrize(("text", "count"), SIZES.items(), ids=SIZES)
def test_sizes_are_read_as_people_and_kubernetes_write_them(text, count):
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "Mi", "-1", "-1Gi", "nan", "inf", "1e999", "5I", "5Qi", "1..2", "ten", "1Gi2"])
def test_what_is_no_size_is_refused_with_the_text(text):
    with pytest.raises(ValueError, match="is no size in bytes") as caught:
        parse_bytes(text)
    assert repr(text) in str(caught.value)


@given(st.integers(0, 1 << 50))
def test_a_plain_number_of_bytes_is_itself(count):
    assert parse_bytes(str(count)) == count


SHOWN = {0: "0 B", 1023: "1023 B", 1024: "1.0 KiB", 438 << 20: "438.0 MiB", 3 << 29: "1.5 GiB", 1 << 41: "2048.0 GiB"}


@pytest.mark.parametrize(("count", "text"), SHOWN.items())
def test_sizes_are_shown_in_the_largest_fitting_unit(count, text):
    assert format_bytes(count) == text


def test_nanoseconds_become_milliseconds():
    assert ms(1_500_000) == 1.5
