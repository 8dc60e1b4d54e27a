"""What a safetensors file holds, read from its header alone: names, shapes, sizes. No torch here."""

import json
import math
import struct
from pathlib import Path
from typing import Any, NamedTuple

from framepack_core.errors import ModelError

MAX_HEADER_BYTES = 1 << 24  # the published shards' have 130 KB


class Tensor(NamedTuple):
    """A tensor in a file."""

    file: Path
    dtype: str  # as the format writes it: F32, BF16 ...
    shape: tuple[int, ...]
    nbytes: int

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
        ValueError: it is no safetensors file, or not whole.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length > min(size - 8, MAX_HEADER_BYTES):
            raise ValueError("no safetensors file, or cut off")
        try:
            told = json.loads(stream.read(length))
            metadata = dict(told.pop("__metadata__", {}))
            tensors = {name: _tensor(file, entry, size - 8 - length) for name, entry in told.items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"its header is damaged: {error!r}"[:200]) from error
    return Header(tensors, metadata)


def read_headers(folder: Path) -> dict[str, Tensor]:
    """Give all tensors of a component of a model, which may be spread over several files.

    Raises:
        ModelError: a file is damaged.
    """
    tensors = dict[str, Tensor]()
    for file in sorted(folder.glob("*.safetensors")):
        try:
            tensors |= read_header(file).tensors
        except (OSError, ValueError) as error:
            raise ModelError(f"{file} is damaged ({error}): download it again") from error
    return tensors


def _tensor(file: Path, entry: dict[str, Any], room: int) -> Tensor:
    start, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    whole = all(isinstance(number, int) and number >= 0 for number in (*shape, start, end))
    if not whole or not start <= end <= room:
        raise ValueError(f"a tensor reaches from {start} to {end} of {room} bytes")
    return Tensor(file, str(entry["dtype"]), shape, end - start)
