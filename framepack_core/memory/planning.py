"""Plans before loading which weights go where, and whether they fit. No torch here."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from framepack_core.errors import FramePackError
from framepack_core.memory.footprint import (
    GIB,
    HALF,
    SLOTS,
    ItemBytes,
    MemoryLevel,
    Placement,
    Tiling,
    Video,
    Weights,
    memory_levels,
    parts,
    peak_vram,
    vram_beside_streaming,
)

UNTILED_FREE = 60 * GIB  # the reference decodes whole frames where more than this is free

# Host memory of Python, torch and CUDA, a section's frames, and a checkpoint that is being written.
BASE_RAM = int(2.5 * GIB)
MARGIN = 0.95  # of the room for blocks that stay: other programs sometimes take some of it
BUS, PAGE_CACHE, DISK = 20e9, 6e9, 2e9  # bytes a second: page-locked, through a staging copy, NVMe


@dataclass(frozen=True)
class Card:
    """A GPU; bytes."""

    name: str
    total: int
    free: int  # with what this process uses, CUDA's context included, counted as free

    @classmethod
    def assumed(cls, gib: float) -> "Card":
        """Assume a card of ``gib`` GiB, of which the driver and a desktop take a twentieth."""
        usable = int(gib * GIB * 0.95)
        return cls(f"a card with {gib:g} GiB", usable, usable)


@dataclass(frozen=True)
class Host:
    """Host memory; bytes."""

    limit: int  # of the machine, or of this process's control group
    available: int  # now, including pages that can be dropped

    @classmethod
    def assumed(cls, gib: float) -> "Host":
        """Assume a host of ``gib`` GiB, of which the system and a desktop take an eighth."""
        return cls(int(gib * GIB), int(gib * GIB * 0.875))


@dataclass(frozen=True)
class Plan:
    """Where the parts of a model go, and how much memory that takes; bytes."""

    level: int  # the first level to try, as an index
    levels: tuple[MemoryLevel, ...]
    pinned: bool  # whether streamed blocks are kept in page-locked memory at that level
    pinnable: bool  # whether host memory suffices for that, at any level
    places: Mapping[str, tuple[int, str]]  # part -> its bytes, where it is
    vram: int  # predicted peak
    ram: int  # predicted peak of memory that cannot be dropped: page-locked, converted, the process itself
    mapped: int  # files that are mapped; the kernel drops their pages when memory is short
    speed: str
    room: int = 0  # on the card, for blocks that stay while others are streamed
    shortage: str | None = None  # why it does not fit, by how much, and what to do
    hopeless: bool = False  # would not fit even if card and memory were otherwise empty

    @property
    def text(self) -> str:
        """The plan in one line."""
        return f"{self.levels[self.level].text}; {self.vram / GIB:.1f} GiB VRAM, {self.ram / GIB:.1f} GiB RAM"


class PlanError(FramePackError):
    """A video does not fit; the text says which memory is short, by how much, and what to do."""


def make_plan(
    weights: Weights,
    card: Card | None,
    host: Host,
    video: Video,
    *,
    tiling: Tiling = "auto",
    keep_free: int = 0,
    item_bytes: ItemBytes = HALF,
    changed: Mapping[str, int] = MappingProxyType({}),
) -> Plan:
    """Choose the memory level for a video.

    Args:
        weights: of the model.
        card: None to compute on the CPU.
        host: the host's memory.
        video: what to make.
        tiling: of the VAE; ``auto``: as the reference, whole frames where more than 60 GiB are free.
        keep_free: bytes of the card to leave to other programs.
        item_bytes: of a parameter.
        changed: the number of parameters that LoRAs change, by part.
    """
    if card is None:
        return _cpu_plan(weights, host, video, tiling, item_bytes, changed)
    free = card.free - keep_free
    levels = memory_levels(tiling, video, streamable=item_bytes.streamable)
    peaks = [peak_vram(weights, level, video, item_bytes) for level in levels]
    left = vram_beside_streaming(weights, video, free, item_bytes)
    core = int(weights.core.parameters * item_bytes.core)
    a_block = int(weights.core.largest * item_bytes.core)
    room = min(int(left * MARGIN), core)
    fitting = [
        number
        for number, level in enumerate(levels)
        if peaks[number] <= free
        and not (level.tile is None and tiling == "auto" and free <= UNTILED_FREE)
        and not (level.placement == "partly" and room < a_block)
    ]
    chosen = fitting[0] if fitting else len(levels) - 1
    if levels[chosen].placement != "partly":  # reached only if a prediction was wrong: be careful then
        room = max(min(room, core // 2), 0)
    vram = peaks[chosen]
    if levels[chosen].placement == "partly":
        vram = max(vram, free - left + room)
    placed = _placed(weights, levels, chosen, vram, room, host, item_bytes, changed)
    if tiling is False and not video.decodable_whole:
        short = (
            f"frames of {video.width}x{video.height} are too large to be decoded whole, whatever the card: "
            'set vae_tiling = "auto", or a smaller resolution'
        )
        return replace(placed, shortage=short, hopeless=True)
    if not fitting:
        short = _short_of_vram(weights, card, video, tiling, keep_free, peaks[-1], item_bytes)
        return replace(placed, shortage=short, hopeless=peaks[-1] > card.total)
    return placed


def _placed(
    weights: Weights,
    levels: tuple[MemoryLevel, ...],
    chosen: int,
    vram: int,
    room: int,
    host: Host,
    item_bytes: ItemBytes,
    changed: Mapping[str, int],
) -> Plan:
    placement = levels[chosen].placement
    streamed = placement in ("partly", "streamed")
    core = int(weights.core.parameters * item_bytes.core)
    # Weights stored in another dtype are converted into memory of the process.
    converted = {
        name: int(part.parameters * item_bytes(name))
        for name, part in parts(weights)
        if part.item_bytes != item_bytes(name)
    }
    # So are the weights that LoRAs change.
    merged = {name: int(count * item_bytes(name)) for name, count in changed.items()}
    converted = merged | converted
    mapped = sum(part.stored_bytes for _, part in parts(weights))
    # Weights that are streamed from their files pass through page-locked memory.
    layer = int(SLOTS * weights.text_encoder.largest * item_bytes.others) if placement != "all" else 0
    block = int(SLOTS * weights.core.largest * item_bytes.core) if streamed else 0
    ram = BASE_RAM + sum(converted.values()) + layer
    with_pinned = ram + core - converted.get("core", 0)
    pinnable = with_pinned + GIB <= host.available  # 1 GiB: pages of files while they are read
    pinned = streamed and pinnable
    ram = with_pinned if pinned else max(ram, ram - layer + block)
    stays = room if placement == "partly" else 0
    plan = Plan(
        level=chosen,
        levels=levels,
        pinned=pinned,
        pinnable=pinnable,
        places=_places(weights, placement, item_bytes, stays, pinned=pinned),
        vram=vram,
        ram=ram,
        mapped=mapped,
        speed=(
            _speed(core - stays, host.available - ram, pinned=pinned)
            if streamed
            else _RESIDENT_SPEED[placement]
        ),
        room=room,
    )
    return _within_ram(plan, host)


def _within_ram(plan: Plan, host: Host) -> Plan:
    if plan.ram <= host.available:
        return plan
    short = (
        f"{plan.ram / GIB:.1f} GiB of RAM are needed and {host.available / GIB:.1f} are available, "
        f"{(plan.ram - host.available) / GIB:.1f} too few: end other programs, "
        "raise the limit of the service (MemoryMax), or add memory"
    )
    return replace(plan, shortage=short, hopeless=plan.ram > host.limit)


_RESIDENT_SPEED = {
    "all": "full: nothing moves",
    "core": "full: nothing moves while it samples; a new prompt fetches the text encoder",
}


def _speed(core: int, room: int, *, pinned: bool) -> str:
    if pinned:
        return f"full where a step takes over {core / BUS:.1f} s: weights are fetched while others compute"
    if room >= core:
        return (
            f"slower where a step takes less than {core / PAGE_CACHE:.0f} s: too little RAM to page-lock them"
        )
    return f"slow: every step reads {core / 1e9:.0f} GB from the disk, {core / DISK:.0f} s at 2 GB/s"


def _places(
    weights: Weights, placement: Placement, item_bytes: ItemBytes, room: int, *, pinned: bool
) -> dict[str, tuple[int, str]]:
    once = "on the GPU layer by layer, once a video"
    streamed = "streamed to the GPU block by block, from " + (
        "page-locked RAM" if pinned else "its files, which RAM caches as far as possible"
    )
    stays = "on the GPU"
    partly = f"{room / GIB:.1f} GiB on the GPU while it samples, the rest {streamed}"
    where = {
        "core": {"partly": partly, "streamed": streamed}.get(placement, stays),
        "embedders": once,
        "text_encoder": "on the GPU layer by layer, for each new prompt",
        "text_encoder_2": "on the GPU while it encodes",
        "image_encoder": "on the GPU while it encodes",
        "vae": stays if placement == "core" else "on the GPU while it decodes",
    }
    return {
        name: (int(part.parameters * item_bytes(name)), stays if placement == "all" else where[name])
        for name, part in parts(weights)
    }


def _short_of_vram(
    weights: Weights,
    card: Card,
    video: Video,
    tiling: Tiling,
    keep_free: int,
    needed: int,
    item_bytes: ItemBytes,
) -> str:
    free = card.free - keep_free
    smallest = memory_levels(tiling, video, streamable=item_bytes.streamable)[-1]
    remedies = []
    if keep_free and needed <= card.free:
        remedies.append(f"lower gpu_memory_preservation, which keeps {keep_free / GIB:.1f} GiB")
    if tiling is False:
        remedies.append('set vae_tiling = "auto"')
    if not item_bytes.streamable:
        remedies.append('set precision = "exact" or "fp8", whose weights can be streamed')
    side = math.sqrt(video.height * video.width)
    for resolution in range(int(side) // 32 * 32, 224, -32):
        scaled = replace(
            video,
            height=round(video.height * resolution / side / 16) * 16,
            width=round(video.width * resolution / side / 16) * 16,
        )
        if peak_vram(weights, smallest, scaled, item_bytes) <= free:
            remedies.append(f"set resolution = {resolution}")
            break
    if card.free < card.total and needed <= card.total:
        remedies.append("end what else uses the card")
    remedies.append(f"use a card with {math.ceil(needed / GIB / 0.95 + keep_free / GIB):.0f} GiB or more")
    return (
        f"a video of {video.width}x{video.height} needs {needed / GIB:.1f} GiB of VRAM, "
        f"and {max(free, 0) / GIB:.1f} are free, {(needed - free) / GIB:.1f} too few: "
        + ", or ".join(remedies)
    )


def _cpu_plan(
    weights: Weights,
    host: Host,
    video: Video,
    tiling: Tiling,
    item_bytes: ItemBytes,
    changed: Mapping[str, int],
) -> Plan:
    levels = memory_levels(tiling, video, streamable=item_bytes.streamable)
    placed = _placed(weights, levels, 0, 0, 0, host, item_bytes, changed)
    return replace(
        placed,
        places={name: (size, "in RAM") for name, (size, _) in placed.places.items()},
        speed="days a video for the full models: a GPU is needed",
    )


def host_memory(
    meminfo: Path = Path("/proc/meminfo"),
    cgroup: Path = Path("/proc/self/cgroup"),
    cgroups: Path = Path("/sys/fs/cgroup"),
) -> Host:
    """Read how much memory this process may use, and how much of it is available now."""
    lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    limit, available = (int(lines[name].split()[0]) << 10 for name in ("MemTotal", "MemAvailable"))
    for folder in _control_groups(cgroup, cgroups):
        try:
            most = (folder / "memory.max").read_text().strip()
            used = int((folder / "memory.current").read_text())
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):  # the root has none of them
            continue
        if most != "max":
            files = int(stat.get("inactive_file", 0)) + int(stat.get("active_file", 0))
            limit = min(limit, int(most))
            available = min(available, int(most) - used + files)
    return Host(limit, max(available, 0))


def _control_groups(cgroup: Path, cgroups: Path) -> Iterator[Path]:
    """Give the folders of this process's control group and of all above it (cgroup version 2)."""
    try:
        lines = cgroup.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        if line.startswith("0::"):
            own = cgroups / line.removeprefix("0::").lstrip("/")
            yield from (folder for folder in (own, *own.parents) if folder.is_relative_to(cgroups))
