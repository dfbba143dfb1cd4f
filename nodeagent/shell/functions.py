"""The functions that this node was told to serve: declared, loaded into the host store, made known to the state, removed.

Owns the table of functions. Never reads a model itself (the loader does) and never schedules.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Protocol

import msgspec

from contracts.errors import NotFound, Refused, SluiceError, Unavailable
from contracts.functions import Function, ModelRef, Share
from contracts.lane_wire import Attach
from contracts.wire import FunctionInfo
from nodeagent.events import Event, FunctionDeclared, FunctionSpec, ShareChanged
from nodeagent.shell.hoststore import HostStore, Stored
from nodeagent.shell.loader import Loader
from nodeagent.shell.requests import check_signature
from nodeagent.shell.stats import FunctionStats


class FunctionsOwner(Protocol):
    """What the table needs of the agent."""

    def handle(self, event: Event) -> None:
        """Feeds the state."""

    def refusal(self, key: str, share: Share, weight_bytes: int = 0) -> str | None:
        """Why a function with this share cannot be served."""

    def function_changed(self, entry: Entry) -> None:
        """A function appeared or changed."""

    def function_gone(self, entry: Entry) -> None:
        """A function was removed."""

    async def prepare(self, entry: Entry) -> None:
        """Returns when a new function's first request would meet no lane that has yet to pin its weights."""

    def forget(self, entry: Entry) -> None:
        """Nothing is needed any more of what `prepare` did."""

    def function_withdrawn(self, entry: Entry) -> None:
        """A ready function serves no more."""


class Entry:
    """One function. `state` is "loading", "ready", "failed" or "removed"; `stored` and `attach` are there once it is loaded.

    `attached`: a lane has answered its attach, or never will. `fault`: what was found against it while it was loaded. `lane_name` is what lanes call
    it: a function that is removed and declared again is another one to them.
    """

    __slots__ = ("attach", "attached", "fault", "function", "lane_name", "loaded", "reason", "state", "stats", "stored")

    def __init__(self, function: Function, generation: int) -> None:
        self.function = function
        self.lane_name = f"{function.key}@{generation}"
        self.state = "loading"
        self.reason = ""
        self.fault: SluiceError | None = None
        self.stats = FunctionStats()
        self.loaded = asyncio.Event()
        self.attached = asyncio.Event()
        self.stored: Stored
        self.attach: Attach

    @property
    def info(self) -> FunctionInfo:
        """What predictors are told."""
        signature = self.stored.index.signature if self.state == "ready" else None
        return FunctionInfo(self.function, self.state, self.reason, signature)

    @property
    def tokenizer(self) -> tuple[str, int] | None:
        """The name of its tokenizer and the descriptor to read it by; None while it takes no text."""
        text = self.stored.index.signature.text if self.state == "ready" else None
        return None if text is None else (text.tokenizer, self.stored.tokenizer_fd)

    @property
    def spec(self) -> FunctionSpec:
        """What the state is told."""
        function, index = self.function, self.stored.index
        return FunctionSpec(function.key, function.cls, function.share, function.slo, index.total_bytes, index.run_ns)


class Functions:
    """All functions by key."""

    def __init__(self, store: HostStore, loader: Loader, owner: FunctionsOwner) -> None:
        self._store = store
        self._loader = loader
        self._owner = owner
        self._entries: dict[str, Entry] = {}
        self._generation = 0
        self._loading = asyncio.Lock()
        self._collecting: asyncio.Task[None] | None = None

    def get(self, key: str) -> Entry | None:
        """The function, whatever its state."""
        return self._entries.get(key)

    def __getitem__(self, key: str) -> Entry:
        return self._entries[key]

    def __iter__(self) -> Iterator[Entry]:
        return iter(list(self._entries.values()))

    async def declare(self, function: Function) -> None:
        """Returns when the function is ready, and raises what stood against it; a changed function replaces the one of its key."""
        old = self._entries.get(function.key)
        if old is not None and old.function == function and old.state != "failed":
            await old.loaded.wait()
            if old.state == "failed":
                raise Unavailable(old.reason)
            return
        if old is not None and old.state == "ready" and msgspec.structs.replace(old.function, share=function.share) == function:
            self.set_share(function.key, function.share)
            return
        self._refuse(function)
        self._generation += 1
        entry = Entry(function, self._generation)
        if old is not None:
            self._withdraw(old)
        self._entries[function.key] = entry
        self._owner.function_changed(entry)
        try:
            await self._load(entry)
        except SluiceError as error:
            self._fail(entry, error)
            raise
        finally:
            if old is not None:
                self._release(old)

    def set_share(self, key: str, share: Share) -> None:
        """Changes a share from the next batch on; NotFound, or Refused when it cannot be guaranteed."""
        entry = self._known(key)
        function = msgspec.structs.replace(entry.function, share=share)
        self._refuse(function)
        entry.function = function
        if entry.state == "ready":
            self._owner.handle(ShareChanged(key, share))
        self._owner.function_changed(entry)

    def remove(self, key: str) -> None:
        """Serves it no more: what runs is still answered. NotFound if there is none."""
        entry = self._known(key)
        del self._entries[key]
        self._withdraw(entry)
        self._release(entry)
        self._owner.function_gone(entry)

    def break_off(self, entry: Entry, error: SluiceError) -> None:
        """A function turned out not to work: it serves no more until it is declared again."""
        if self._entries.get(entry.function.key) is entry and entry.state == "ready":
            self._withdraw(entry)
            self._release(entry)
            self._fail(entry, error)
        elif entry.state == "loading":
            entry.fault = error

    async def repair(self, entry: Entry) -> None:
        """A lane died with this function: checks the stored weights, and reads them again for all who use them if they are damaged."""
        if entry.state != "ready" or await self._store.intact(entry.stored) or entry.state != "ready":
            return
        stored = entry.stored
        self._store.discard(stored)
        damaged = [other for other in self if other.state == "ready" and other.stored is stored]
        for other in damaged:
            self.break_off(other, Unavailable("its weights in the host store were damaged; they are read again"))
        for other in damaged:
            with contextlib.suppress(SluiceError):
                await self.declare(other.function)

    async def _load(self, entry: Entry) -> None:
        model = entry.function.model
        async with self._loading:
            stored = await self._store.find(model) or await self._read(model)
        entry.stored = stored
        entry.attach = Attach(entry.lane_name, stored.index_json, str(self._store.folder))
        try:
            check_signature(stored.index.signature)
            self._refuse_late(entry)
            await self._owner.prepare(entry)
            self._refuse_late(entry)
        except BaseException:
            self._owner.forget(entry)
            self._store.release(stored)
            self._collect()
            raise
        entry.state = "ready"
        entry.loaded.set()
        self._owner.handle(FunctionDeclared(entry.spec))
        self._owner.function_changed(entry)

    def _refuse_late(self, entry: Entry) -> None:
        """What may have come up against a function while it was loaded."""
        if self._entries.get(entry.function.key) is not entry:
            raise NotFound(f"{entry.function.key} was removed while it was loaded")
        if entry.fault is not None:
            raise entry.fault
        self._refuse(entry.function, entry.stored.index.total_bytes)

    async def _read(self, model: ModelRef) -> Stored:
        """Has the loader read a model into the store; models that no function uses give way if the budget needs it."""
        while True:
            self._store.sweep()
            try:
                return self._store.add(await self._loader.load(model, self._store.room_bytes))
            except Unavailable:
                if not self._store.drop_unclaimed():
                    raise

    def _fail(self, entry: Entry, error: SluiceError) -> None:
        entry.state = "failed"
        entry.reason = error.message
        entry.loaded.set()
        if self._entries.get(entry.function.key) is entry:
            self._owner.function_changed(entry)

    def _withdraw(self, entry: Entry) -> None:
        """The state forgets it; its weights stay until `_release`."""
        if entry.state == "ready":
            self._owner.function_withdrawn(entry)

    def _release(self, entry: Entry) -> None:
        if entry.state == "ready":
            entry.state = "removed"
            self._store.release(entry.stored)
            self._collect()

    def _collect(self) -> None:
        """Removes the files of forgotten models as soon as the loader is at rest."""
        if self._collecting is None or self._collecting.done():
            self._collecting = asyncio.get_running_loop().create_task(self._sweep())

    async def _sweep(self) -> None:
        async with self._loading:
            self._store.sweep()

    def _refuse(self, function: Function, weight_bytes: int = 0) -> None:
        reason = self._owner.refusal(function.key, function.share, weight_bytes)
        if reason is not None:
            raise Refused(f"{function.key}: {reason}")

    def _known(self, key: str) -> Entry:
        entry = self._entries.get(key)
        if entry is None:
            raise NotFound(f"no function {key!r} on this node")
        return entry
