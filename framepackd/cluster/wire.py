"""Frames between a bridge and its node: a header of JSON, and bytes. Nothing that arrives is unpickled."""

import contextlib
import json
import select
import socket
import struct
import threading
import time
from multiprocessing.connection import wait
from typing import Any, NamedTuple

MAX_HEADER_BYTES = 1 << 20
PART_BYTES = 16 << 20  # the most that one frame holds of a file
_LENGTHS = struct.Struct(">II")  # of the header and of the body


class WireError(Exception):
    """What arrived is no frame; the text says what it is."""


class Frame(NamedTuple):
    """A header, whose ``kind`` says what it is, and the bytes that belong to it."""

    header: dict[str, Any]
    body: bytes = b""

    @property
    def kind(self) -> str:
        """What it is."""
        return str(self.header.get("kind"))


def packed(header: dict[str, Any], body: bytes = b"") -> bytes:
    """Give a frame as it is sent.

    Raises:
        WireError: it is too long.
    """
    return _head(header, len(body)) + body


def _head(header: dict[str, Any], body: int) -> bytes:
    """Give a frame as it is sent, without the bytes of its body."""
    text = json.dumps(header, ensure_ascii=False, allow_nan=False).encode()
    _check(len(text), body)
    return _LENGTHS.pack(len(text), body) + text


class Wire:
    """One end of a stream socket. Several threads may send; one may receive."""

    def __init__(self, end: socket.socket) -> None:
        """Take over a connected socket."""
        self._end = end
        self._end.setblocking(True)
        self._sending = threading.Lock()
        self._frame = bytearray(_LENGTHS.size)  # what arrives now, its lengths first
        self._there = 0  # bytes of it

    def fileno(self) -> int:
        """Give the socket's descriptor, to wait for it beside others."""
        return self._end.fileno()

    @property
    def is_gone(self) -> bool:
        """Whether the other end has closed it; what it sent before may still be there to receive."""
        poll = select.poll()
        poll.register(self._end, select.POLLRDHUP)
        return bool(poll.poll(0))

    def send(self, header: dict[str, Any], body: bytes = b"") -> None:
        """Send a frame; waits while the other end does not read.

        Raises:
            WireError: it is too long.
            OSError: the other end is gone.
        """
        head = _head(header, len(body))
        with self._sending:
            self._end.sendall(head)
            if body:
                self._end.sendall(body)  # not joined to the header: that would copy it

    def send_packed(self, frames: bytes) -> None:
        """Send whole frames as :func:`packed` gives them, or as :meth:`receive_packed` received them."""
        with self._sending:
            self._end.sendall(frames)

    def receive(self, seconds: float | None = None) -> Frame | None:
        """Give the next frame; None if it has not arrived whole after so many seconds.

        Raises:
            EOFError: the other end is gone.
            WireError: it is no frame.
        """
        frame = self.receive_packed(seconds)
        return None if frame is None else unpacked(frame)

    def receive_packed(self, seconds: float | None = None) -> bytes | None:
        """Give the next frame as it was sent; else as :meth:`receive`."""
        until = None if seconds is None else time.monotonic() + seconds
        while True:
            if self._there == len(self._frame):
                header, body = map(int, _LENGTHS.unpack_from(self._frame))
                _check(header, body)
                size = _LENGTHS.size + header + body
                if self._there == size:
                    frame = bytes(self._frame)
                    self._frame, self._there = bytearray(_LENGTHS.size), 0
                    return frame
                self._frame.extend(bytes(size - self._there))
            left = None if until is None else max(until - time.monotonic(), 0)
            if not wait([self._end], left):  # no timeout of the socket's own: it would hold for sending too
                return None
            self._there += self._receive_some()

    def _receive_some(self) -> int:
        """Receive some of the frame that arrives now, and nothing beyond it."""
        with memoryview(self._frame) as frame:
            try:
                got = self._end.recv_into(frame[self._there :])
            except ConnectionResetError:
                got = 0
        if not got:
            raise EOFError("the other end is gone")
        return got

    def shut(self) -> None:
        """End both directions: a thread that receives here or there sees the end at once."""
        with contextlib.suppress(OSError):  # the other end is gone already
            self._end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close it; :meth:`shut` first if a thread receives."""
        self._end.close()


def unpacked(frame: bytes) -> Frame:
    """Read a frame.

    Raises:
        WireError: its header is no JSON object with a kind.
    """
    size, _ = _LENGTHS.unpack_from(frame)
    text = frame[_LENGTHS.size : _LENGTHS.size + size]
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:  # as deep as a header is long
        raise WireError(f"the header of a frame is no JSON: {text[:80]!r}") from error
    if not isinstance(header, dict) or not isinstance(header.get("kind"), str):
        raise WireError(f"the header of a frame has no kind: {text[:80]!r}")
    return Frame(header, frame[_LENGTHS.size + size :])


def _check(header: int, body: int) -> None:
    if header > MAX_HEADER_BYTES or body > PART_BYTES:
        raise WireError(
            f"a frame of {header} + {body} bytes is longer than {MAX_HEADER_BYTES} + {PART_BYTES}"
        )
