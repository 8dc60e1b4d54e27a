"""Is this machine ready: config, folders, database, models, GPU, disk, a line each; and the memory plan."""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from framepack_core import footprint, models, planning, tiny_weights
from framepack_core.buckets import BUCKET_RESOLUTION, scale_buckets
from framepack_core.errors import FramePackError, RequestError
from framepack_core.footprint import GIB, ItemBytes, Video, Weights
from framepack_core.planning import Card, Host, Plan
from framepack_core.request import Lora
from framepackd import folders, loras
from framepackd.config import Config, filesystem_type, poll_seconds
from framepackd.database import StoreError
from framepackd.jobs import JobStore
from framepackd.settings import JobSettings

Check = tuple[bool | None, str, str]  # fine (None: only said), what was looked at, what was found

WIDTHS = {"float32": (4, 4)}  # in bytes, of an assumed card; half precision otherwise
DISK_RESERVE_BYTES = 2 << 30  # a minute of video at the highest quality, and the database


def run_checks(config: Config, *, gpu: bool) -> Iterator[Check]:
    """Look at everything a run needs; yields each finding as it is made."""
    settings = ", ".join(f"{key} = {value}" for key, value in config.defaults.items())
    yield True, "config", f"model {config.model}, settings {settings or 'as published'}"
    for name, path in config.folders.items():
        another = None if name == "state_dir" else folders.trouble(name, config)
        yield (False, name, another) if another else _folder(name, path)
    events = filesystem_type(config.inbox)
    yield (
        None,
        "watching",
        f"{events or 'unknown'} file system: a full look every {poll_seconds(config):.0f} s",
    )
    yield _database(config)
    for name in dict.fromkeys([config.model, *config.models]):
        yield _model(config, name)
    yield _loras(config)
    if config.preview_decoder is not None:
        yield _preview_decoder(config.preview_decoder, whole=gpu)
    yield _disk(config.state_dir)
    if gpu:
        yield from _device(config)


def _folder(name: str, path: Path) -> Check:
    nearest = next(folder for folder in (path, *path.parents) if folder.exists())
    if not nearest.is_dir():
        return False, name, f"{nearest} is a file: move it away, or set another {name}"
    if not os.access(nearest, os.R_OK | os.W_OK | os.X_OK):
        return False, name, f"{nearest} cannot be written by this user: change its owner or rights"
    return True, name, str(path) if path.exists() else f"{path} (will be made)"


def _database(config: Config) -> Check:
    if not config.database.exists():
        return True, "database", f"{config.database} (will be made)"
    try:
        counts = JobStore(config.database, read_only=True).counts()
    except StoreError as error:
        return False, "database", str(error)
    return (
        True,
        "database",
        ", ".join(f"{count} {state}" for state, count in counts.items() if count) or "empty",
    )


def _model(config: Config, name: str) -> Check:
    try:
        models.find(config.spec(name))
    except FramePackError as error:
        return False, f"model {name}", str(error)
    return True, f"model {name}", "every file is here"


def _loras(config: Config) -> Check:
    try:
        for entry in JobSettings(**config.defaults).loras:
            loras.find(entry.file, config.lora_dir)
    except RequestError as error:
        return False, "lora_dir", f"[defaults] {error}"
    return None, "lora_dir", f"{config.lora_dir}: {loras.listing(config.lora_dir)}"


def _preview_decoder(file: Path, *, whole: bool) -> Check:
    """Look at the tiny decoder; ``whole``: load it, which needs torch."""
    try:
        tiny_weights.check_file(file)
        if whole:
            from framepack_core.tiny_decoder import TinyDecoder

            TinyDecoder.load(file)
    except FramePackError as error:
        return False, "preview_decoder", str(error)
    return True, "preview_decoder", str(file)


def _disk(path: Path) -> Check:
    nearest = next(folder for folder in (path, *path.parents) if folder.exists())
    free = shutil.disk_usage(nearest).free
    if free < DISK_RESERVE_BYTES:
        return False, "disk", f"{free / 2**30:.1f} GiB free in {nearest}: make room, 2 GiB are needed"
    return True, "disk", f"{free / 2**30:.0f} GiB free"


def _device(config: Config) -> Iterator[Check]:
    from framepack_core import memory
    from framepack_core.attention import choose_attention

    try:
        device = memory.choose_device(config.gpu.device)
        transformer, encoders = memory.choose_dtypes(device, config.gpu.dtype)
        attention = choose_attention(config.gpu.attention, device)
    except FramePackError as error:
        yield False, "device", str(error)
        return
    dtypes = f"transformer {transformer}, encoders and VAE {encoders}".replace("torch.", "")
    yield True, "attention", attention
    card = memory.card(device)
    if card is None:
        small = config.model == "demo"
        note = "" if small else ": the full models take days a video here; a CUDA GPU is needed"
        yield small or None, "device", f"cpu, {dtypes}{note}"
        return
    yield True, "device", f"{card.name}, {card.free / GIB:.0f} GiB free, {dtypes}"


@dataclass(frozen=True)
class Forecast:
    """A memory plan, and what it is for."""

    model: str
    weights: Weights
    card: Card | None
    host: Host
    video: Video  # the largest by the config's defaults
    plan: Plan


def forecast(config: Config, *, gpu: bool, vram: float | None, ram: float | None) -> Forecast | None:
    """Plan for the largest video that a job without settings of its own makes; None where nothing is known.

    Args:
        config: names the model.
        gpu: whether to look at the GPU.
        vram: GiB of a card to assume instead.
        ram: GiB of host memory to assume instead.

    Raises:
        FramePackError: the device is not there, or a file of the model is damaged.
    """
    spec = config.spec(config.defaults.get("model", config.model))
    widths = WIDTHS.get(config.gpu.dtype, (2, 2))
    if vram is not None:
        card: Card | None = Card.assumed(vram)
    elif gpu:
        from framepack_core import memory

        device = memory.choose_device(config.gpu.device)
        card = memory.card(device)
        transformer, encoders = memory.choose_dtypes(device, config.gpu.dtype)
        widths = transformer.itemsize, encoders.itemsize
    else:
        return None
    settings = JobSettings(**config.defaults)
    sizes = scale_buckets(settings.resolution or BUCKET_RESOLUTION)
    if settings.resolution is None:
        sizes = spec.buckets
    if settings.height is not None and settings.width is not None:
        sizes = ((settings.height, settings.width),)
    video = max((Video.asked_for(settings, size) for size in sizes), key=lambda video: video.tokens)
    host = planning.host_memory() if ram is None else Host.assumed(ram)
    weights = footprint.weights(spec)
    merged = [Lora(file=loras.find(entry.file, config.lora_dir)) for entry in settings.loras]
    plan = planning.make_plan(
        weights,
        card,
        host,
        video,
        tiling=config.gpu.vae_tiling,
        keep_free=int((settings.gpu_memory_preservation or 0) * GIB),
        item_bytes=ItemBytes.of(*widths, config.gpu.precision),
        changed=footprint.changed(merged, spec) if weights.on_disk else {},
    )
    return Forecast(spec.name, weights, card, host, video, plan)
