"""Tokenizers on their way: from the host store, which outlives the agent, to each predictor that owns a model that takes text."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from blake3 import blake3
from torch import nn

from contracts.artifact import Signature, TensorSpec
from contracts.errors import InvalidTensor
from contracts.functions import Function, ModelFormat, ModelRef, Share
from contracts.wire import FunctionChanged, FunctionGone, FunctionInfo, Message, Part, Submit, TensorRef, Tokenizer, Welcome
from nodeagent.shell.hoststore import HostStore
from nodeagent.shell.requests import count_rows
from tests.models.text_models import WORDS, Encoder, export, tokenizer_json
from tests.nodeagent.node import Control, Node, Predictor, eventually, short_folder


class Reader:
    """A predictor's end that keeps what it is told, in order; descriptors are read and closed."""

    def __init__(self, node: Node) -> None:
        self._predictor = Predictor(node.run_dir)
        self.tokenizers: dict[str, bytes] = {}
        self.told: list[str] = []
        self.functions: dict[str, FunctionInfo] = {}

    def next(self) -> Message:
        """One message."""
        received = self._predictor.channel.receive()
        assert received is not None, "the agent closed the connection"
        message, fds = received
        self.told.append(type(message).__name__)
        if isinstance(message, Tokenizer):
            with pytest.raises(OSError, match=r"Operation not permitted"):
                os.pwrite(fds[0], b"x", 0)
            with pytest.raises(OSError, match=r"Operation not permitted"):
                os.ftruncate(fds[0], 0)
            self.tokenizers[message.name] = os.pread(fds[0], 1 << 20, 0)
            os.close(fds[0])
        elif isinstance(message, Welcome | FunctionChanged):
            for info in message.functions if isinstance(message, Welcome) else (message.info,):
                self.functions[info.function.key] = info
                text = info.signature.text if info.signature else None
                assert text is None or text.tokenizer in self.tokenizers, "the tokenizer comes first"
        return message

    def until(self, kind: type[Message]) -> Message:
        """The first message of a kind."""
        while not isinstance(message := self.next(), kind):
            pass
        return message

    def close(self) -> None:
        """Hangs up."""
        self._predictor.close()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Function]:
    """Two text models with one tokenizer, one with another, and one without."""
    found = {}
    for name, words in (("a", WORDS), ("b", WORDS), ("c", (*WORDS, "lisbon")), ("plain", ())):
        folder: Path = tmp_path_factory.mktemp(name)
        module = Encoder()
        nn.init.constant_(module.inner.bias, float(len(found)))
        path = export(module, folder / "model.pt2")
        if words:
            (folder / "tokenizer.json").write_text(tokenizer_json(words))
        found[name] = Function(name, ModelRef(ModelFormat.TORCH_EXPORT, str(path)), share=Share(50, 500))
    return found


@pytest.fixture
def node() -> Iterator[Node]:
    with short_folder() as folder:
        node = Node(folder / "run", module="nodeagent", memory="8Mi", host="64Mi").ready()
        yield node
        node.remove()


def name_of(words: tuple[str, ...]) -> str:
    return f"{blake3(tokenizer_json(words).encode()).hexdigest()}.tokenizer"


def test_a_predictor_gets_each_tokenizer_once_before_what_names_it(node: Node, models: dict[str, Function]) -> None:
    control = Control(node.run_dir)
    control.declare(models["a"], models["b"], models["plain"])
    control.grant()
    reader = Reader(node)
    reader.until(Welcome)
    assert reader.told == ["Tokenizer", "Welcome"]
    assert reader.tokenizers == {name_of(WORDS): tokenizer_json().encode()}
    reader.told.clear()
    control.share("default/a", Share(100, 500))
    reader.until(FunctionChanged)
    assert reader.told == ["FunctionChanged"], "it has the tokenizer, as long as the function names it"
    control.declare(models["c"])
    while reader.functions.get("default/c") is None or reader.functions["default/c"].state != "ready":
        reader.next()
    assert reader.told == ["FunctionChanged", "FunctionChanged", "Tokenizer", "FunctionChanged"]
    reader.told.clear()
    control.remove("default/c")
    reader.until(FunctionGone)
    control.declare(models["c"])
    reader.until(Tokenizer)
    assert reader.functions["default/plain"].signature is not None
    assert reader.functions["default/plain"].signature.text is None
    reader.close()


def test_a_tokenizer_stays_as_long_as_a_model_needs_it_and_counts_in_the_budget(node: Node, models: dict[str, Function]) -> None:
    control = Control(node.run_dir)
    control.declare(models["plain"])
    without = control.status().host_used_bytes
    control.declare(models["a"], models["b"])
    content = len(tokenizer_json())
    each = (control.status().host_used_bytes - without - 2 * content) / 2
    assert each > 0, "the index and the weights of each; the program is shared"
    assert (node.store / name_of(WORDS)).is_file()
    control.remove("default/a")
    assert (node.store / name_of(WORDS)).is_file()
    control.remove("default/b")
    eventually(lambda: not (node.store / name_of(WORDS)).exists(), "the sweep")
    assert control.status().host_used_bytes == without


def test_the_next_agent_adopts_a_tokenizer_and_reads_a_damaged_one_again(node: Node, models: dict[str, Function]) -> None:
    control = Control(node.run_dir)
    control.declare(models["a"])
    control.declare(models["c"])
    node.kill()
    (node.store / name_of((*WORDS, "lisbon"))).write_text("{}")
    inode = (node.store / name_of(WORDS)).stat().st_ino
    again = Node(node.run_dir, module="nodeagent", memory="8Mi", host="64Mi").ready()
    try:
        control = Control(again.run_dir)
        control.declare(models["a"], models["c"])
        control.grant()
        reader = Reader(again)
        reader.until(Welcome)
        assert {name: content.decode() for name, content in reader.tokenizers.items()} == {
            name_of(words): tokenizer_json(words) for words in (WORDS, (*WORDS, "lisbon"))
        }
        assert (again.store / name_of(WORDS)).stat().st_ino == inode
        reader.close()
    finally:
        assert again.terminate() == 0
        os.close(again._log)


def test_models_with_one_tokenizer_share_one_copy_and_leave_no_descriptor(tmp_path: Path, models: dict[str, Function]) -> None:
    from models.load import load
    from models.store_writer import write

    folder = tmp_path / "store"
    store = HostStore(folder, 1 << 30)
    before = set(os.listdir("/proc/self/fd"))
    stored = [store.add(write(load(models[name].model), folder, 1 << 30).digest) for name in ("a", "b")]
    assert len({os.fstat(one.tokenizer_fd).st_ino for one in stored}) == 1
    store.release(stored[0])
    assert os.pread(stored[1].tokenizer_fd, 1 << 20, 0) == tokenizer_json().encode()
    store.release(stored[1])
    assert set(os.listdir("/proc/self/fd")) <= before
    store.close(remove=True)


PADDED = Signature(
    inputs=(TensorSpec("ids", "INT64", ("batch", "seq"), pad=0), TensorSpec("k", "INT64", ("batch", "width"))),
    outputs=(TensorSpec("states", "INT64", ("batch", "seq")),),
    padded=("seq",),
)


def batch(*shapes: tuple[int, int, int]) -> Submit:
    """A part of (rows, tokens, width) each."""
    at, parts = 0, []
    for rows, tokens, width in shapes:
        refs = []
        for name, sizes in (("ids", (rows, tokens)), ("k", (rows, width)), ("states", (rows, tokens))):
            refs.append(TensorRef(name, "INT64", sizes, at, 8 * sizes[0] * sizes[1]))
            at += refs[-1].nbytes
        parts.append(Part(rows, tuple(refs[:2]), tuple(refs[2:])))
    return Submit(1, "default/a", tuple(parts), 1, 2)


def test_parts_may_differ_where_the_model_pads_and_nowhere_else() -> None:
    assert count_rows(batch((1, 5, 2), (2, 9, 2)), PADDED, 8, 1 << 20) == 3
    with pytest.raises(InvalidTensor, match="must agree in every dimension but the rows and those that are padded"):
        count_rows(batch((1, 5, 2), (2, 5, 3)), PADDED, 8, 1 << 20)
