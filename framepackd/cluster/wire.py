"""Frames between a bridge and its node: a header of JSON, and bytes. Nothing that arrives is unpickled."""

import contextlib
import json
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
    return _head(header, body) + body


def _head(header: dict[str, Any], body: bytes) -> bytes:
    """Give what is sent before the body."""
    text = json.dumps(header, ensure_ascii=False, allow_nan=False).encode()
    _check(len(text), len(body))
    return _LENGTHS.pack(len(text), len(body)) + text


class Wire:
    """One end of a stream socket. Several threads may send; one may receive."""

    def __init__(self, end: socket.socket) -> None:
        """Take over a connected socket."""
        self._end = end
        self._end.setblocking(True)
        self._sending = threading.Lock()
        self._frame, self._filled = bytearray(_LENGTHS.size), 0  # what arrives, and how much of it has

    def fileno(self) -> int:
        """Give the socket's descriptor, to wait for it beside others."""
        return self._end.fileno()

    def send(self, header: dict[str, Any], body: bytes = b"") -> None:
        """Send a frame; waits while the other end does not read.

        Raises:
            WireError: it is too long.
            OSError: the other end is gone.
        """
        head = _head(header, body)
        with self._sending:
            self._end.sendall(head)
            self._end.sendall(body)  # by itself: it may be long, and is not copied

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
        while not self._is_whole():
            left = None if until is None else max(until - time.monotonic(), 0)
            if not self._fill(left):
                return None
        frame, self._frame, self._filled = bytes(self._frame), bytearray(_LENGTHS.size), 0
        return frame

    def _is_whole(self) -> bool:
        """Say whether a frame has arrived; makes room for all of it once its lengths are known."""
        if self._filled < len(self._frame):
            return False
        header, body = map(int, _LENGTHS.unpack_from(self._frame))
        _check(header, body)
        size = _LENGTHS.size + header + body
        if size > self._filled:
            lengths, self._frame = self._frame, bytearray(size)
            self._frame[: self._filled] = lengths
        return size == self._filled

    def _fill(self, seconds: float | None) -> bool:
        """Receive more of the frame; False if nothing comes for so many seconds."""
        with memoryview(self._frame) as frame:
            room = frame[self._filled :]
            try:
                got = self._end.recv_into(room, 0, socket.MSG_DONTWAIT)
            except BlockingIOError:  # no timeout of the socket's own: it would hold for sending too
                return bool(wait([self._end], seconds))
            except ConnectionResetError:
                got = 0
            finally:
                room.release()
        if not got:
            raise EOFError("the other end is gone")
        self._filled += got
        return True

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
    except ValueError as error:
        raise WireError(f"the header of a frame is no JSON: {text[:80]!r}") from error
    if not isinstance(header, dict) or not isinstance(header.get("kind"), str):
        raise WireError(f"the header of a frame has no kind: {text[:80]!r}")
    return Frame(header, frame[_LENGTHS.size + size :])


def _check(header: int, body: int) -> None:
    if header > MAX_HEADER_BYTES or body > PART_BYTES:
        raise WireError(
            f"a frame of {header} + {body} bytes is longer than {MAX_HEADER_BYTES} + {PART_BYTES}"
        )
