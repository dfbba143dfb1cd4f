"""The front's tokenizers: built once, off the loop, let go of when nobody needs them, and no more text than the threads can work off."""

import asyncio
import os
import struct
from collections.abc import Iterator

import msgspec
import numpy as np
import pytest
from hypothesis import given as examples
from hypothesis import strategies as st

from contracts.artifact import Text
from contracts.errors import ExecutionError, InvalidTensor, Refused, Unavailable
from predictor import text as module
from predictor.tensors import NESTED, Given
from predictor.text import Tokenizers, texts
from tests.models.text_models import WORDS, tokenizer_json
from tests.predictor.fake_agent import TOKENS

NAME = "a.tokenizer"
SIGNATURE = msgspec.structs.replace(TOKENS, text=Text(NAME, 8))


def memfd(content: str = tokenizer_json()) -> int:
    fd = os.memfd_create("tokenizer", os.MFD_CLOEXEC)
    os.write(fd, content.encode())
    return fd


def given(*texts: str) -> Given:
    return Given("text", NESTED, None, list(texts))


@examples(st.lists(st.text(max_size=20), min_size=1, max_size=20))
def test_texts_come_back_from_their_frames(wanted: list[str]) -> None:
    data = b"".join(struct.pack("<I", len(text.encode())) + text.encode() for text in wanted)
    assert texts(Given("text", [len(wanted), 1], "BYTES", memoryview(data))) == wanted


@examples(st.binary(max_size=64), st.integers(-2, 9))
def test_any_bytes_are_texts_or_the_callers_error(data: bytes, rows: int) -> None:
    try:
        found = texts(Given("text", [rows], "BYTES", data))
    except InvalidTensor as error:
        assert error.key.startswith("text")  # noqa: PT017 - either outcome is right
    else:
        assert b"".join(struct.pack("<I", len(text.encode())) + text.encode() for text in found) == data


@pytest.fixture
def open_fds() -> Iterator[None]:
    """No descriptor is left over."""
    before = set(os.listdir("/proc/self/fd"))
    yield
    assert set(os.listdir("/proc/self/fd")) <= before


@pytest.mark.asyncio
async def test_one_descriptor_serves_any_number_of_readers_and_is_closed_with_the_last_need(open_fds: None) -> None:
    fd = memfd()
    for start in (0, len(tokenizer_json()) // 2):
        os.lseek(fd, start, os.SEEK_SET)  # whoever shares the descriptor may have moved it
        tokenizers = Tokenizers()
        tokenizers.add(NAME, os.dup(fd))
        tokenizers.add(NAME, os.dup(fd))
        found = await tokenizers.inputs(given("the old boat", "a"), SIGNATURE, 2)
        assert found["input_ids"].tolist() == [[9, 8, 3], [2, 1, 1]]
        assert found["attention_mask"].dtype == np.int64
        assert tokenizers.prepare(SIGNATURE.text) is tokenizers.prepare(SIGNATURE.text)
        tokenizers.forget(NAME)
        with pytest.raises(Unavailable, match="has not come"):
            await tokenizers.inputs(given("a"), SIGNATURE, 2)
    os.close(fd)


@pytest.mark.asyncio
async def test_the_loop_goes_on_while_much_text_is_tokenised() -> None:
    tokenizers = Tokenizers()
    tokenizers.add(NAME, memfd())
    await tokenizers.prepare(Text(NAME, 8))
    working = asyncio.ensure_future(tokenizers.inputs(given(*["old " * 16_000] * 8), SIGNATURE, 8))
    beats = 0
    while not working.done():
        beats += 1
        await asyncio.sleep(0)
    assert beats > 10, "with a blocked loop it would be one or two"
    assert (await working)["input_ids"].shape == (8, 8)
    tokenizers.forget(NAME)


@pytest.mark.asyncio
async def test_more_text_than_can_wait_is_refused_and_the_room_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_WAITING_BYTES", 200_000)
    tokenizers = Tokenizers()
    tokenizers.add(NAME, memfd())
    long = given(*["old " * 16_000] * 3)
    first = asyncio.ensure_future(tokenizers.inputs(long, SIGNATURE, 8))
    await asyncio.sleep(0)
    with pytest.raises(Refused, match="too much text waits"):
        await tokenizers.inputs(long, SIGNATURE, 8)
    await first
    second = asyncio.ensure_future(tokenizers.inputs(long, SIGNATURE, 8))
    await asyncio.sleep(0)
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    assert (await tokenizers.inputs(long, SIGNATURE, 8))["input_ids"].shape == (3, 8)
    tokenizers.forget(NAME)


@pytest.mark.asyncio
async def test_a_cancelled_request_does_not_stop_the_building_for_the_others() -> None:
    tokenizers = Tokenizers()
    tokenizers.add(NAME, memfd())
    first, second = (asyncio.ensure_future(tokenizers.inputs(given("the boat"), SIGNATURE, 8)) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    assert (await second)["input_ids"].tolist() == [[WORDS.index("the"), WORDS.index("boat")]]
    tokenizers.forget(NAME)


@pytest.mark.asyncio
async def test_a_tokenizer_that_does_not_work_here_is_no_fault_of_the_request() -> None:
    tokenizers = Tokenizers()
    tokenizers.add(NAME, memfd("{}"))
    for _ in range(2):
        with pytest.raises(ExecutionError, match="its tokenizer does not work"):
            await tokenizers.inputs(given("the boat"), SIGNATURE, 8)
    tokenizers.forget(NAME)
