"""A ZeroMQ socket that an asyncio loop reads, without zmq.asyncio, which takes three times the time for a message."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import zmq

log = logging.getLogger("rpc")

# Plain integers: pyzmq's enumerations cost as much as its calls do.
_NOBLOCK, _MORE, _READABLE = int(zmq.NOBLOCK), int(zmq.NOBLOCK | zmq.SNDMORE), int(zmq.POLLIN)


class LoopSocket:
    """Owns a socket. Calls `receive` with the parts of each message, one message per round of the running loop:
    whatever a message has set off takes its first step before the next message is read.
    """

    def __init__(self, socket: zmq.Socket[bytes], receive: Callable[[list[bytes]], None]) -> None:
        self.socket = socket
        self._receive = receive
        self._loop = asyncio.get_running_loop()
        self._is_read = True
        self._is_due = False  # `_read` will look again anyway
        self._loop.add_reader(socket.FD, self._read)
        self._look()

    def send(self, *parts: bytes) -> None:
        """Hand a message over without waiting. Raises zmq.ZMQError: zmq.Again where the peer does not read."""
        *first, last = parts
        try:
            for part in first:
                self.socket.send(part, _MORE)
            self.socket.send(last, _NOBLOCK)
        finally:
            self._look()

    def stop_reading(self) -> None:
        if self._is_read:
            self._is_read = False
            self._loop.remove_reader(self.socket.FD)

    def close(self, linger_ms: int = 0) -> None:
        """Messages that were sent have linger_ms to leave."""
        self.stop_reading()
        self.socket.close(linger_ms)

    def _read(self) -> None:
        self._is_due = False
        if not self._is_read:
            return
        try:
            parts = self.socket.recv_multipart(_NOBLOCK)
        except zmq.Again:  # the descriptor tells of other events too
            return
        self._is_due = True
        try:
            self._receive(parts)
        except Exception:  # the owner's bug; other messages are still to be read
            log.exception("a message could not be received")
        finally:
            self._is_due = False
            self._look()

    def _look(self) -> None:
        """Read again if there is something: the descriptor signals a change once, and any call may have taken that."""
        if self._is_read and not self._is_due and int(self.socket.get(zmq.EVENTS)) & _READABLE:
            self._is_due = True
            self._loop.call_soon(self._read)
