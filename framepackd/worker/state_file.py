"""Reads which files a checkpoint's state names, without torch."""

import hashlib
import json
from typing import Any

HASH_BYTES = hashlib.sha256().digest_size


class DamagedError(Exception):
    """A file is not what was written, or belongs to another job or version."""


def read_header(content: bytes) -> dict[str, Any]:
    """Give what a state says beside its tensors, if it is what was written: JSON.

    Raises:
        DamagedError: it is not.
    """
    digest, content = content[:HASH_BYTES], content[HASH_BYTES:]
    if hashlib.sha256(content).digest() != digest:
        raise DamagedError("is not what was written")
    size = int.from_bytes(content[:8], "little")  # as safetensors lays it out
    header: dict[str, Any] = json.loads(json.loads(content[8 : 8 + size])["__metadata__"]["checkpoint"])
    return header


def named_files(content: bytes) -> frozenset[str]:
    """Name the files of the checkpoint that a state says belong to it.

    Raises:
        DamagedError: it is no state.
    """
    try:
        return frozenset(read_header(content)["files"])
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise DamagedError("is no state") from error
