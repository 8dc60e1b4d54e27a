"""Reads the header of a safetensors file: names, shapes, sizes. No torch here."""

import json
import math
import re
import struct
from pathlib import Path
from typing import NamedTuple, TypedDict

MAX_HEADER_BYTES = 1 << 24  # the headers of the published shards have 130 KB
START_BYTES = 512  # from which other kinds of files are recognized
FLOAT_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}
ITEM_BYTES = FLOAT_BYTES | {"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}

EMPTY, GGUF, POINTER = "empty", "a GGUF file", "a Git LFS pointer, which only stands for the file"
PAGE, ANSWER, PICKLE = "an HTML page", "a text", "a pickle, which can run code"
_KINDS = (
    (re.compile(rb"GGUF"), GGUF),
    (re.compile(rb"version https://git-lfs"), POINTER),
    (re.compile(rb"\s*<(!doctype|html|\?xml|head|!--)", re.IGNORECASE), PAGE),
    (re.compile(rb"PK\x03\x04|\x80[\x02-\x05]"), PICKLE),  # torch's archives, and its older format
    (re.compile(rb"\s*[{\[]|[\x20-\x7e\s]{16}"), ANSWER),
)


class OtherKindError(ValueError):
    """A file is of a known kind other than safetensors."""

    def __init__(self, kind: str) -> None:
        """Take the kind: one of the constants above."""
        super().__init__(f"it is {kind}")
        self.kind = kind


class Tensor(NamedTuple):
    """A tensor in a file."""

    file: Path
    dtype: str  # safetensors' name: F32, BF16 ...
    shape: tuple[int, ...]
    nbytes: int
    key: str = ""  # its name in the file
    scale: "Tensor | None" = None  # by which its numbers have to be multiplied
    start: int = 0  # where its numbers begin in the file

    @property
    def parameters(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)


class Header(NamedTuple):
    """The header of a safetensors file."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]


def read_header(file: Path) -> Header:
    """Read the header of a safetensors file.

    Raises:
        OSError: it cannot be read.
        OtherKindError: it is a file of another known kind.
        ValueError: it is not a safetensors file, or is damaged.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length > min(size - 8, MAX_HEADER_BYTES):
            kind = _kind(start + stream.read(START_BYTES))
            raise OtherKindError(kind) if kind else ValueError("no safetensors file, or cut off")
        try:
            entries = json.loads(stream.read(length))
            metadata = dict(entries.pop("__metadata__", {}))
            tensors = {name: _tensor(file, name, entry, size, 8 + length) for name, entry in entries.items()}
            _verify_offsets([entry["data_offsets"] for entry in entries.values()], size - 8 - length)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"its header is damaged: {error!r}"[:200]) from error
    return Header(tensors, metadata)


def _kind(start: bytes) -> str | None:
    """Recognize the kind of a file that is not safetensors; None if it is unknown."""
    if not start:
        return EMPTY
    if start[8:9] == b"{":  # a safetensors header after all: its length can look like a pickle's start
        return None
    return next((kind for pattern, kind in _KINDS if pattern.match(start)), None)


class _Entry(TypedDict):
    """A tensor in the JSON of a header; a damaged file may hold anything else."""

    dtype: str
    shape: list[int]
    data_offsets: list[int]


def _tensor(file: Path, name: str, entry: _Entry, size: int, data: int) -> Tensor:
    room = size - data
    start, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    whole = all(isinstance(number, int) and number >= 0 for number in (*shape, start, end))
    if not whole or not start <= end <= room:
        raise ValueError(f"a tensor reaches from {start} to {end} of {room} bytes")
    dtype = str(entry["dtype"])
    if dtype in ITEM_BYTES and end - start != math.prod(shape) * ITEM_BYTES[dtype]:
        raise ValueError(f"{name} has {end - start} bytes for {math.prod(shape)} numbers {dtype}")
    return Tensor(file, dtype, shape, end - start, name, start=data + start)


def _verify_offsets(spans: list[list[int]], room: int) -> None:
    """Check that tensors are contiguous and fill the file, as the safetensors library demands."""
    end = 0
    for start, after in sorted(spans):
        if start != end:
            raise ValueError(f"a tensor begins at {start}, the one before ends at {end}")
        end = after
    if end != room:
        raise ValueError(f"its tensors take {end} of {room} bytes")
