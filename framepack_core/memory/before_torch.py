"""Sets environment variables before torch is imported: the visible card, and the allocator.

A process sees only the card that it computes on, as ``cuda:0``: libraries make streams and contexts on the
first visible card, whatever device they are given. No torch here.
"""

import os
import re
import sys
from collections.abc import Mapping, MutableMapping
from itertools import takewhile
from pathlib import Path

CARDS = Path("/proc/driver/nvidia/gpus")  # one folder per card
KERNEL = Path("/proc/sys/kernel/osrelease")
ALL = "all"
VISIBLE, ORDER = "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"
BY_BUS = "PCI_BUS_ID"  # the order of nvidia-smi; by default CUDA begins with the fastest card
ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # torch reads both; the second is the old name
_UUID = re.compile(r"GPU-[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")

names_here: dict[str, str] = {}  # the configured name of the only visible card -> its name in this process


def set_up(device: str, environment: MutableMapping[str, str] = os.environ) -> None:
    """Prepare this process for a device of the configuration; does nothing once torch is imported.

    ``all`` leaves every card visible, as ``cuda:0`` and so on. Respects the user's variables: settings of the
    allocator stay, and ``cuda:1`` is the second card that ``CUDA_VISIBLE_DEVICES`` lists.
    """
    if "torch" in sys.modules:
        return
    # Components of all sizes come and go: expandable segments leave no gaps between them.
    if not is_wsl() and not any(name in environment for name in ALLOCATOR):
        environment[ALLOCATOR[0]] = "expandable_segments:True"
    numbered = re.fullmatch(r"cuda:(\d+)", device)
    card = _card(int(numbered[1]), environment) if numbered else None
    if device == ALL and VISIBLE not in environment:
        environment.setdefault(ORDER, BY_BUS)
    if card is not None:
        environment[VISIBLE] = card
        names_here[device] = "cuda:0"


def is_wsl() -> bool:
    """Return whether this is Linux on Windows, where expandable segments fail at the first allocation."""
    return KERNEL.exists() and "microsoft" in KERNEL.read_text().lower()


def name_here(device: str) -> str:
    """Give the name in this process of a device of the configuration."""
    return names_here.get(device, device)


def name_outside(device: str) -> str:
    """Give the configuration's name of a device that this process sees under another."""
    return next((name for name, here in names_here.items() if here == device), device)


def _card(number: int, environment: MutableMapping[str, str]) -> str | None:
    """Name a card for ``CUDA_VISIBLE_DEVICES``; None if there is none, which choose_device then reports."""
    if VISIBLE in environment:
        seen = _listed(environment)
        return seen[number] if number < len(seen) else None
    cards = uuids()
    if environment.setdefault(ORDER, BY_BUS) != BY_BUS or not cards:
        return str(number)
    if number >= len(cards):
        return None
    return cards[number] or str(number)


def card_count(environment: Mapping[str, str] = os.environ) -> int:
    """Count the cards that a process may use, as ``cuda:0`` and so on."""
    if VISIBLE in environment:
        return len(_listed(environment))
    return len(uuids())


def _listed(environment: Mapping[str, str]) -> list[str]:
    """List the cards that the user's variable shows; CUDA ignores what follows a mistake in it."""
    entries = (entry.strip() for entry in environment[VISIBLE].split(","))
    return list(takewhile(lambda entry: entry not in ("", "-1"), entries))


def card_name(device: str, environment: Mapping[str, str] = os.environ) -> str | None:
    """Give the model name of a configured device, or ``cpu``; None where the driver does not say."""
    if device == "cpu":
        return device
    numbered = re.fullmatch(r"cuda:(\d+)", device)
    card = _card(int(numbered[1]), dict(environment)) if numbered else None
    return dict(_cards()).get(card) if card else None


def uuids() -> list[str | None]:
    """List the UUIDs of the driver's cards in nvidia-smi's order; None where the driver gives none."""
    return [uuid for uuid, _ in _cards()]


def _cards() -> list[tuple[str | None, str | None]]:
    """List UUID and model name of the driver's cards in nvidia-smi's order."""
    found = []
    for file in CARDS.glob("*/information"):
        pairs = (line.partition(":") for line in file.read_text().splitlines())
        facts = {key.strip(): value.strip() for key, _, value in pairs}
        if facts.get("GPU Excluded", "No") == "No":
            location = facts.get("Bus Location", file.parent.name)
            uuid = facts.get("GPU UUID", "")
            # domain:bus:device.function, in hexadecimal
            numbers = [int(part, 16) for part in re.findall(r"[0-9a-fA-F]+", location)]
            found.append((numbers, uuid if _UUID.fullmatch(uuid) else None, facts.get("Model")))
    return [(uuid, model) for _, uuid, model in sorted(found, key=lambda card: card[0])]
