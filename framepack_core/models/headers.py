"""Reads the header of a safetensors file: names, shapes, sizes. No torch here."""

import json
import math
import re
import struct
from pathlib import Path
from typing import Any, NamedTuple

MAX_HEADER_BYTES = 1 << 24  # the published shards' have 130 KB
START_BYTES = 512  # by which another kind of file is known
FLOAT_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}
ITEM_BYTES = FLOAT_BYTES | {"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}

EMPTY, GGUF, POINTER = "empty", "a GGUF file", "a Git LFS pointer, which only stands for the file"
PAGE, ANSWER, PICKLE = "an HTML page", "a text", "a pickle, which can run code"
_KINDS = (
    (re.compile(rb"GGUF"), GGUF),
    (re.compile(rb"version https://git-lfs"), POINTER),
    (re.compile(rb"\s*<(!doctype|html|\?xml|head|!--)", re.IGNORECASE), PAGE),
    (re.compile(rb"PK\x03\x04|\x80[\x02-\x05]"), PICKLE),  # torch's archives, and what it wrote before
    (re.compile(rb"\s*[{\[]|[\x20-\x7e\s]{16}"), ANSWER),
)


class OtherKindError(ValueError):
    """A file is no safetensors file but something else that is known."""

    def __init__(self, kind: str) -> None:
        """Take what it is: one of the kinds above."""
        super().__init__(f"it is {kind}")
        self.kind = kind


class Tensor(NamedTuple):
    """A tensor in a file."""

    file: Path
    dtype: str  # as the format writes it: F32, BF16 ...
    shape: tuple[int, ...]
    nbytes: int
    key: str = ""  # by which its file knows it
    scale: "Tensor | None" = None  # what its numbers are to be multiplied by

    @property
    def parameters(self) -> int:
        """Count its numbers."""
        return math.prod(self.shape)


class Header(NamedTuple):
    """What a file holds."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]


def read_header(file: Path) -> Header:
    """Read the header of a safetensors file.

    Raises:
        OSError: it cannot be read.
        OtherKindError: it is no safetensors file, but one of another kind.
        ValueError: it is no safetensors file, or not whole.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length > min(size - 8, MAX_HEADER_BYTES):
            kind = _kind(start + stream.read(START_BYTES))
            raise OtherKindError(kind) if kind else ValueError("no safetensors file, or cut off")
        try:
            told = json.loads(stream.read(length))
            metadata = dict(told.pop("__metadata__", {}))
            tensors = {name: _tensor(file, name, entry, size - 8 - length) for name, entry in told.items()}
            _verify_room([entry["data_offsets"] for entry in told.values()], size - 8 - length)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"its header is damaged: {error!r}"[:200]) from error
    return Header(tensors, metadata)


def _kind(start: bytes) -> str | None:
    """Say what a file is that is no safetensors file; None if it is none of what is known."""
    if not start:
        return EMPTY
    if start[8:9] == b"{":  # a header begins there: its length may begin as a pickle does
        return None
    return next((kind for pattern, kind in _KINDS if pattern.match(start)), None)


def _tensor(file: Path, name: str, entry: dict[str, Any], room: int) -> Tensor:
    start, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    whole = all(isinstance(number, int) and number >= 0 for number in (*shape, start, end))
    if not whole or not start <= end <= room:
        raise ValueError(f"a tensor reaches from {start} to {end} of {room} bytes")
    dtype = str(entry["dtype"])
    if dtype in ITEM_BYTES and end - start != math.prod(shape) * ITEM_BYTES[dtype]:
        raise ValueError(f"{name} has {end - start} bytes for {math.prod(shape)} numbers {dtype}")
    return Tensor(file, dtype, shape, end - start, name)


def _verify_room(spans: list[list[int]], room: int) -> None:
    """See that tensors lie one behind the other and fill the file, as what reads them demands."""
    end = 0
    for start, after in sorted(spans):
        if start != end:
            raise ValueError(f"a tensor begins at {start}, the one before ends at {end}")
        end = after
    if end != room:
        raise ValueError(f"its tensors take {end} of {room} bytes")
