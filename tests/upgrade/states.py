"""Checkpoints of another version as files: whose they are, read and replaced without that version's code."""

import hashlib
import json
from collections.abc import Callable
from typing import Any

_HASH_BYTES, _SIZE_BYTES = 32, 8


def header_of(state: bytes) -> dict[str, Any]:
    """Read what a state file says of its files and its identity."""
    content = state[_HASH_BYTES:]
    size = int.from_bytes(content[:_SIZE_BYTES], "little")
    described = json.loads(content[_SIZE_BYTES : _SIZE_BYTES + size])
    header: dict[str, Any] = json.loads(described["__metadata__"]["checkpoint"])
    return header


def reidentified(state: bytes, change: Callable[[dict[str, Any]], dict[str, Any]]) -> bytes:
    """Give a state file with another identity, as if it had been written so."""
    content = state[_HASH_BYTES:]
    size = int.from_bytes(content[:_SIZE_BYTES], "little")
    described = json.loads(content[_SIZE_BYTES : _SIZE_BYTES + size])
    header = json.loads(described["__metadata__"]["checkpoint"])
    header["identity"] = change(header["identity"])
    described["__metadata__"]["checkpoint"] = json.dumps(header)
    laid_out = json.dumps(described).encode()
    laid_out += b" " * (-len(laid_out) % _SIZE_BYTES)  # as safetensors aligns it
    changed = len(laid_out).to_bytes(_SIZE_BYTES, "little") + laid_out + content[_SIZE_BYTES + size :]
    return hashlib.sha256(changed).digest() + changed
