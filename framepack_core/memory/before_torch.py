"""Sets environment variables before torch is imported: which card it sees, how it holds memory.

Of several cards a process sees the one it is to compute on, as ``cuda:0``, and no other: libraries make
streams and contexts on the first they see, whatever device they are given. Torch is not imported here.
"""

import os
import re
import sys
from collections.abc import MutableMapping
from itertools import takewhile
from pathlib import Path

CARDS = Path("/proc/driver/nvidia/gpus")  # a folder for each
KERNEL = Path("/proc/sys/kernel/osrelease")
VISIBLE, ORDER = "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"
BY_BUS = "PCI_BUS_ID"  # as nvidia-smi counts; CUDA itself begins with the fastest
ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # torch reads both, the second is the old name
_UUID = re.compile(r"GPU-[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")

_seen: dict[
    str, str
] = {}  # by the name that people use, of the card that this process sees alone: its name here


def set_up(device: str, environment: MutableMapping[str, str] = os.environ) -> None:
    """Prepare this process for a device, named as in the configuration; once torch is imported, do nothing.

    What a person has set stays: an allocator's settings as they are, and of ``CUDA_VISIBLE_DEVICES``
    ``cuda:1`` is the second that it lists.
    """
    if "torch" in sys.modules:
        return
    # Pieces of all sizes come and go with the components: segments that grow leave no gaps between them.
    if not is_wsl() and not any(name in environment for name in ALLOCATOR):
        environment[ALLOCATOR[0]] = "expandable_segments:True"
    numbered = re.fullmatch(r"cuda:(\d+)", device)
    card = _card(int(numbered[1]), environment) if numbered else None
    if card is not None:
        environment[VISIBLE] = card
        _seen[device] = "cuda:0"


def is_wsl() -> bool:
    """Say whether this is Linux on Windows, where segments that grow fail at the first allocation."""
    return KERNEL.exists() and "microsoft" in KERNEL.read_text().lower()


def name_here(device: str) -> str:
    """Give the name under which this process sees a device."""
    return _seen.get(device, device)


def name_outside(device: str) -> str:
    """Give the name of a device that people use, of which this process knows another."""
    return next((name for name, here in _seen.items() if here == device), device)


def _card(number: int, environment: MutableMapping[str, str]) -> str | None:
    """Name a card for ``CUDA_VISIBLE_DEVICES``; None if there is no such one, which CUDA then says."""
    if VISIBLE in environment:
        listed = (entry.strip() for entry in environment[VISIBLE].split(","))
        seen = list(takewhile(lambda entry: entry not in ("", "-1"), listed))  # as CUDA reads it
        return seen[number] if number < len(seen) else None
    cards = uuids()
    if environment.setdefault(ORDER, BY_BUS) != BY_BUS or not cards:
        return str(number)
    if number >= len(cards):
        return None
    return cards[number] or str(number)


def uuids() -> list[str | None]:
    """List the UUIDs of the cards that the driver has, in nvidia-smi's order; None where one is not told."""
    found = []
    for file in CARDS.glob("*/information"):
        pairs = (line.partition(":") for line in file.read_text().splitlines())
        facts = {key.strip(): value.strip() for key, _, value in pairs}
        if facts.get("GPU Excluded", "No") == "No":
            location = facts.get("Bus Location", file.parent.name)
            uuid = facts.get("GPU UUID", "")
            found.append((_place(location), uuid if _UUID.fullmatch(uuid) else None))
    return [uuid for _, uuid in sorted(found, key=lambda card: card[0])]


def _place(location: str) -> list[int]:
    """Take a place on the bus apart, domain:bus:device.function in hexadecimal, to sort by it."""
    return [int(part, 16) for part in re.findall(r"[0-9a-fA-F]+", location)]
