import pytest

from contracts import errors
from contracts.errors import ExecutionError, InvalidTensor, InvalidValue, Refused, SluiceError, from_wire, to_wire
from contracts.frames import FrameDecoder, encode
from contracts.wire import Failed


def _tree(kind):
    return [kind, *(leaf for child in kind.__subclasses__() for leaf in _tree(child))]


@pytest.mark.parametrize("kind", [kind for kind in _tree(SluiceError) if kind.__module__ == "contracts.errors"], ids=lambda kind: kind.__name__)
def test_every_error_comes_back_as_itself(kind):
    there = kind("the lane was lost: try again", retry_after_ms=40)
    back = from_wire(*to_wire(there))
    assert (type(back), back.message, back.retry_after_ms, str(back)) == (kind, there.message, 40, there.message)


def test_the_tree_in_the_docstring_is_the_tree_in_the_code():
    drawn = [line.split()[-len(line.split()) :] for line in errors.__doc__.splitlines() if "─" in line or line.startswith("SluiceError")]
    names = [next(word for word in words if word[0].isalpha()) for words in drawn]
    assert sorted(names) == sorted(kind.__name__ for kind in _tree(SluiceError) if kind.__module__ == "contracts.errors")


def test_an_invalid_value_names_key_value_and_remedy_on_both_sides_of_the_wire():
    there = InvalidTensor("datatype must be FP32", key="input_0", value="INT8")
    back = from_wire(*to_wire(there))
    assert str(back) == str(there) == "input_0: datatype must be FP32, got 'INT8'"
    assert isinstance(back, InvalidValue)
    assert (there.key, there.value, there.reason) == ("input_0", "INT8", "datatype must be FP32")


def test_an_error_from_outside_the_tree_names_its_type():
    back = from_wire(*to_wire(ZeroDivisionError("division by zero")))
    assert type(back) is ExecutionError
    assert back.message == "ZeroDivisionError: division by zero"


def test_a_kind_from_a_newer_peer_is_still_an_error():
    back = from_wire("OutOfTime", "too late", 5)
    assert (type(back), back.message, back.retry_after_ms) == (SluiceError, "too late", 5)


@pytest.mark.parametrize(
    "error",
    [
        InvalidValue("must be short", key="name", value="\x00" * 4_000_000),
        Refused("x" * 5_000_000),
        RuntimeError("é" * 5_000_000),
    ],
    ids=["a value that a peer made huge", "a huge message of our own", "a huge message from a library"],
)
def test_whatever_a_peer_makes_an_error_quote_the_error_fits_a_frame(error):
    kind, message, retry = to_wire(error)
    frame = encode(Failed(1, kind, message, retry))
    assert len(frame) < 20_000
    assert list(FrameDecoder(Failed).feed(frame)) == [Failed(1, kind, message, retry)]
