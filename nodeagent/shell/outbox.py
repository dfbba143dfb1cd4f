"""What one turn of the agent sends, gathered so that each channel gets one write.

Owns the messages until `flush`. Never reads.
"""

from __future__ import annotations

from contracts.channel import AsyncChannel
from contracts.wire import Message

_FDS_PER_WRITE = 8


class Outbox:
    """Messages by channel, in order. Descriptors stay the caller's, and must stay open until `flush`."""

    def __init__(self) -> None:
        self._waiting: dict[AsyncChannel, tuple[list[Message], list[int]]] = {}

    def add(self, channel: AsyncChannel, message: Message, *fds: int) -> None:
        """Puts a message (and its descriptors) behind those that wait for the same channel."""
        waiting = self._waiting.get(channel)
        if waiting is None:
            self._waiting[channel] = waiting = ([], [])
        elif fds and len(waiting[1]) + len(fds) > _FDS_PER_WRITE:
            channel.send(*waiting[0], fds=waiting[1])
            self._waiting[channel] = waiting = ([], [])
        waiting[0].append(message)
        waiting[1].extend(fds)

    def flush(self) -> None:
        """Sends everything."""
        for channel, (messages, fds) in self._waiting.items():
            channel.send(*messages, fds=fds)
        self._waiting.clear()
