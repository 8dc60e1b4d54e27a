"""Is this machine ready: config, folders, database, models, GPU, memory, disk; a line each."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from framepack_core import models
from framepack_core.errors import FramePackError
from framepackd.config import Config, filesystem_type, poll_seconds
from framepackd.database import StoreError
from framepackd.jobs import JobStore

Check = tuple[bool | None, str, str]  # fine (None: only said), what was looked at, what was found

DISK_RESERVE_BYTES = 2 << 30  # a minute of video at the highest quality, and the database
FULL_MODEL_GIB = 26  # the transformer in bfloat16, which is on the device as a whole while it samples


def run_checks(config: Config, *, gpu: bool) -> Iterator[Check]:
    """Look at everything a run needs; yields each finding as it is made."""
    settings = ", ".join(f"{key} = {value}" for key, value in config.defaults.items())
    yield True, "config", f"model {config.model}, settings {settings or 'as published'}"
    for name, path in config.folders.items():
        yield _folder(name, path)
    events = filesystem_type(config.inbox)
    yield (
        None,
        "watching",
        f"{events or 'unknown'} file system: a full look every {poll_seconds(config):.0f} s",
    )
    yield _database(config)
    for name in dict.fromkeys([config.model, *config.models]):
        yield _model(config, name)
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


def _disk(path: Path) -> Check:
    nearest = next(folder for folder in (path, *path.parents) if folder.exists())
    free = shutil.disk_usage(nearest).free
    if free < DISK_RESERVE_BYTES:
        return False, "disk", f"{free / 2**30:.1f} GiB free in {nearest}: make room, 2 GiB are needed"
    return True, "disk", f"{free / 2**30:.0f} GiB free"


def _device(config: Config) -> Iterator[Check]:
    import torch

    from framepack_core import memory

    try:
        device = memory.choose_device(config.gpu.device)
        transformer, encoders = memory.choose_dtypes(device, config.gpu.dtype)
    except FramePackError as error:
        yield False, "device", str(error)
        return
    dtypes = f"transformer {transformer}, encoders and VAE {encoders}".replace("torch.", "")
    free = memory.free_bytes(device)
    if free is None:
        small = config.model == "demo"
        note = "" if small else ": the full models take days a video here; a CUDA GPU is needed"
        yield small or None, "device", f"cpu, {dtypes}{note}"
        return
    gib = free / 2**30
    yield True, "device", f"{torch.cuda.get_device_name(device)}, {gib:.0f} GiB free, {dtypes}"
    if memory.keeps_resident(device):
        yield True, "memory plan", "everything stays on the GPU"
    elif gib > FULL_MODEL_GIB or config.model == "demo":
        yield True, "memory plan", "one part after the other on the GPU, the VAE in tiles"
    else:
        yield (
            False,
            "memory plan",
            f"the full models need {FULL_MODEL_GIB} GiB free on the GPU in this version",
        )
