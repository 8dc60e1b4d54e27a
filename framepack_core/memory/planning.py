"""Plans what lives where, and whether it fits, before anything is loaded. No torch here."""

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
    Placement,
    Rung,
    Tiling,
    Video,
    Weights,
    ladder,
    parts,
    peak_vram,
    vram_beside_streaming,
)

UNTILED_FREE = 60 * GIB  # the reference decodes whole frames where more than this is free

# The host: Python, torch and CUDA's own, a section's frames, a checkpoint on its way to the disk.
BASE_RAM = int(2.5 * GIB)
MARGIN = 0.95  # of what is left for blocks that stay: others take some of it now and then
BUS, PAGE_CACHE, DISK = 20e9, 6e9, 2e9  # bytes a second: page-locked, copied once more on the way, NVMe


@dataclass(frozen=True)
class Card:
    """A GPU; bytes."""

    name: str
    total: int
    free: int  # as if nothing of ours were on it, not even CUDA's context

    @classmethod
    def assumed(cls, gib: float) -> "Card":
        """Give a card of a size, of which the driver and a desktop take a twentieth."""
        usable = int(gib * GIB * 0.95)
        return cls(f"a card with {gib:g} GiB", usable, usable)


@dataclass(frozen=True)
class Host:
    """Host memory; bytes."""

    limit: int  # of the machine, or of the control group that this process is in
    available: int  # now, with the pages that can be dropped

    @classmethod
    def assumed(cls, gib: float) -> "Host":
        """Give a host of a size, of which the system and a desktop take an eighth."""
        return cls(int(gib * GIB), int(gib * GIB * 0.875))


@dataclass(frozen=True)
class Plan:
    """What lives where, and what that takes; bytes."""

    rung: int  # where on the ladder to begin
    rungs: tuple[Rung, ...]
    pinned: bool  # whether streamed weights are kept page-locked in host memory
    pinnable: bool  # whether they would be, if it came to streaming
    places: Mapping[str, tuple[int, str]]  # part -> its bytes, where it lives
    vram: int  # predicted peak
    ram: int  # predicted peak that nothing can take away: page-locked, converted, the process itself
    mapped: int  # files that are read in place; the kernel drops their pages when it needs room
    speed: str
    room: int = 0  # on the card for blocks that stay while others are streamed, where a rung has such
    shortage: str | None = None  # why it cannot work, by how much, and what to do
    hopeless: bool = False  # not even if nothing else were on the card and in memory

    @property
    def text(self) -> str:
        """Say it in a line."""
        return f"{self.rungs[self.rung].text}; {self.vram / GIB:.1f} GiB VRAM, {self.ram / GIB:.1f} GiB RAM"


class PlanError(FramePackError):
    """It cannot work on this machine; the text says which memory is short, by how much, and what to do."""


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
    """Choose what lives where.

    Args:
        weights: of the model.
        card: None to compute on the CPU.
        host: its memory.
        video: the one to make.
        tiling: of the VAE; ``auto``: as the reference, whole frames where more than 60 GiB are free.
        keep_free: bytes to leave on the card to others.
        item_bytes: of a parameter.
        changed: parameters, by part, that LoRAs are merged into.
    """
    if card is None:
        return _cpu_plan(weights, host, video, tiling, item_bytes, changed)
    free = card.free - keep_free
    rungs = ladder(tiling, video, streamable=item_bytes.streamable)
    peaks = [peak_vram(weights, rung, video, item_bytes) for rung in rungs]
    left = vram_beside_streaming(weights, video, free, item_bytes)
    core, a_block = (
        int(count * item_bytes.core) for count in (weights.core.parameters, weights.core.largest)
    )
    room = min(int(left * MARGIN), core)
    fitting = [
        number
        for number, rung in enumerate(rungs)
        if peaks[number] <= free
        and not (rung.tile is None and tiling == "auto" and free <= UNTILED_FREE)
        and not (rung.placement == "partly" and room < a_block)
    ]
    chosen = fitting[0] if fitting else len(rungs) - 1
    if rungs[chosen].placement != "partly":  # from further up it is gone down to where a prediction was wrong
        room = max(min(room, core // 2), 0)
    vram = peaks[chosen]
    if rungs[chosen].placement == "partly":
        vram = max(vram, free - left + room)
    placed = _placed(weights, rungs, chosen, vram, room, host, item_bytes, changed)
    if tiling is False and not video.decodable_whole:
        return replace(placed, shortage=_too_large_to_decode_whole(video), hopeless=True)
    if not fitting:
        short = _short_of_vram(weights, card, video, tiling, keep_free, peaks[-1], item_bytes)
        return replace(placed, shortage=short, hopeless=peaks[-1] > card.total)
    return placed


def _placed(
    weights: Weights,
    rungs: tuple[Rung, ...],
    chosen: int,
    vram: int,
    room: int,
    host: Host,
    item_bytes: ItemBytes,
    changed: Mapping[str, int],
) -> Plan:
    placement = rungs[chosen].placement
    streamed = placement in ("partly", "streamed")
    core = int(weights.core.parameters * item_bytes.core)
    # What its files hold in another dtype is converted, and then no longer the file's.
    converted = {
        name: int(part.parameters * item_bytes(name))
        for name, part in parts(weights)
        if part.item_bytes != item_bytes(name)
    }
    # Nor is what LoRAs are merged into, whatever its file holds.
    merged = {name: int(count * item_bytes(name)) for name, count in changed.items()}
    converted = merged | converted
    mapped = sum(part.stored_bytes for _, part in parts(weights))
    # What is streamed from its files is page-locked on its way.
    layer = int(SLOTS * weights.text_encoder.largest * item_bytes.others) if placement != "all" else 0
    block = int(SLOTS * weights.core.largest * item_bytes.core) if streamed else 0
    ram = BASE_RAM + sum(converted.values()) + layer
    with_pinned = ram + core - converted.get("core", 0)
    pinnable = with_pinned + GIB <= host.available  # the last: of files, while they are read
    pinned = streamed and pinnable
    ram = with_pinned if pinned else max(ram, ram - layer + block)
    stays = room if placement == "partly" else 0
    plan = Plan(
        rung=chosen,
        rungs=rungs,
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
        return f"full where a step takes over {core / BUS:.1f} s: weights are fetched behind the computing"
    if room >= core:
        return (
            f"slower where a step takes less than {core / PAGE_CACHE:.0f} s: too little RAM to lock copies in"
        )
    return f"slow: every step reads {core / 1e9:.0f} GB from the disk, {core / DISK:.0f} s at 2 GB/s"


def _places(
    weights: Weights, placement: Placement, item_bytes: ItemBytes, room: int, *, pinned: bool
) -> dict[str, tuple[int, str]]:
    once = "on the GPU layer by layer, once a video"
    streamed = "streamed to the GPU block by block, from " + (
        "page-locked RAM" if pinned else "its files, which RAM holds as far as it goes"
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
        name: (
            int(part.parameters * item_bytes(name)),
            stays if placement == "all" else where[name],
        )
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
    smallest = ladder(tiling, video, streamable=item_bytes.streamable)[-1]
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
    rungs = ladder(tiling, video, streamable=item_bytes.streamable)
    placed = _placed(weights, rungs, 0, 0, 0, host, item_bytes, changed)
    return replace(
        placed,
        places={name: (size, "in RAM") for name, (size, _) in placed.places.items()},
        speed="days a video for the full models: a GPU is needed",
    )


def _too_large_to_decode_whole(video: Video) -> str:
    return (
        f"frames of {video.width}x{video.height} are too large to be decoded whole, whatever the card: "
        'set vae_tiling = "auto", or a smaller resolution'
    )


def host_memory(
    meminfo: Path = Path("/proc/meminfo"),
    cgroup: Path = Path("/proc/self/cgroup"),
    cgroups: Path = Path("/sys/fs/cgroup"),
) -> Host:
    """Read how much memory this process may have, and how much of it is available now."""
    told = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    limit, available = (int(told[name].split()[0]) << 10 for name in ("MemTotal", "MemAvailable"))
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
    """Give the folders of the control group this process is in, and of all above it (version 2)."""
    try:
        lines = cgroup.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        if line.startswith("0::"):
            own = cgroups / line.removeprefix("0::").lstrip("/")
            yield from (folder for folder in (own, *own.parents) if folder.is_relative_to(cgroups))
