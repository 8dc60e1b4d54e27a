"""framepackd check: config, folders, database, models, GPU, disk, a line each; and the memory plan."""

import os
import shutil
import stat
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from framepack_core.errors import FramePackError, RequestError
from framepack_core.media.sizes import BUCKET_RESOLUTION, scale_buckets
from framepack_core.memory import footprint, planning
from framepack_core.memory.footprint import GIB, ItemBytes, Video, Weights
from framepack_core.memory.planning import Card, Host, Plan
from framepack_core.models import model_files, taehv_files
from framepackd import folders
from framepackd.files import filesystem_type
from framepackd.jobs import job_warnings
from framepackd.jobs.database import StoreError
from framepackd.jobs.store import JobStore
from framepackd.settings import loras
from framepackd.settings.config import SECRET_KEYS, Config, own_config, poll_seconds
from framepackd.settings.job_settings import JobSettings
from framepackd.settings.secret_files import SecretError
from framepackd.supervisor.readiness import is_gpu_expected, nearest

if TYPE_CHECKING:
    import torch

# Fine (None: for information; "warning": correct it, but no run needs that), the thing checked, the finding.
Check = tuple[bool | Literal["warning"] | None, str, str]

WIDTHS = {"float32": (4, 4)}  # in bytes, of an assumed card; half precision otherwise
SLOWER = "not compiled, which is slower"
DISK_RESERVE_BYTES = 2 << 30  # a minute of video at the highest quality, and the database


def run_checks(config: Config, *, gpu: bool) -> Iterator[Check]:
    """Check everything a run needs; yields each finding as it is made."""
    settings = ", ".join(f"{key} = {value}" for key, value in config.defaults.items())
    where = (
        str(config.file) if config.file else f"none, so the defaults: framepackd init writes {own_config()}"
    )
    yield True, "config", where
    yield True, "default model", f"{config.model}, with {settings or 'its published settings'}"
    for warning in job_warnings.of_crf(config.defaults):
        yield "warning", "crf", f"[defaults] {warning}"
    yield from _secrets(config)
    for name, path in config.folders.items():
        another = None if name == "state_dir" else folders.trouble(name, config)
        yield (False, name, another) if another else _folder(name, path)
    events = filesystem_type(config.inbox)
    yield (
        None,
        "watching",
        f"{events or 'unknown'} file system: the whole inbox is looked at every {poll_seconds(config):.0f} s",
    )
    yield _database(config)
    if config.gpu.devices:
        for name in dict.fromkeys([config.model, *config.models]):
            yield from _model(config, name)
    else:
        yield None, "models", "no device of this machine computes: framepackd nodes check asks the others"
    yield _loras(config)
    if config.preview_decoder is not None:
        yield _preview_decoder(config.preview_decoder, whole=gpu)
    yield _disk(config.state_dir)
    if config.cluster.nodes:
        yield _cluster(config)
    if gpu:
        several = len(config.gpu.devices) > 1
        for number, name in enumerate(config.gpu.devices):
            found = _device(config, name)
            # The rest is the same for cards of the same kind.
            shown = found if number == 0 else (check for check in found if check[1] == "device")
            for fine, what, text in shown:
                yield fine, what, f"{name}: {text}" if several and what == "device" else text


def _cluster(config: Config) -> Check:
    """Ask which other machines there are, and whether all that are named answer."""
    from framepackd.cluster import roll

    try:
        nodes = roll.ask(config.cluster.socket_path)
    except OSError as error:
        return False, "cluster", str(error)
    there = {node.host: ", ".join(node.devices) or "no cards" for node in nodes if node.alive}
    silent = {*config.cluster.hosts, *(node.host for node in nodes)} - there.keys()
    found = "; ".join(f"{host}: {cards}" for host, cards in there.items()) or "no other machine has joined"
    if silent:
        found += f"; no answer from {', '.join(sorted(silent))}: look at framepackd node there"
    return bool(there) and not silent & {*config.cluster.hosts}, "cluster", found


def _secrets(config: Config) -> Iterator[Check]:
    """Check the files of secrets, and who else can read secrets in the configuration."""
    for key, file in (
        ("password_file", config.web.password_file),
        ("webhook_file", config.notify.webhook_file),
    ):
        if file is None:
            continue
        try:
            config.web.read_password() if key == "password_file" else config.notify.read_webhook()
        except SecretError as error:
            # A command in a shell sees no credentials, and need not be the service's user.
            yield "warning", key, str(error)
        else:
            yield True, key, str(file)
    readers = readers_of_secrets(config)
    if readers:
        yield "warning", "secrets", readers


def readers_of_secrets(config: Config) -> str | None:
    """Say who else can read a secret in the configuration's file, and what to do; None if there is none."""
    if config.file is None:
        return None
    try:
        written = tomllib.loads(config.file.read_text(encoding="utf-8-sig"))
        status = config.file.stat()
    except (OSError, ValueError):  # changed since it was read
        return None
    keys = [
        f"{key} under [{section}]"
        for section, key in SECRET_KEYS
        if isinstance(written.get(section), dict) and written[section].get(key)
    ]
    droppers = config.inbox.stat().st_gid if config.inbox.exists() else None
    by_all = status.st_mode & stat.S_IROTH
    by_group = status.st_mode & stat.S_IRGRP and status.st_gid == droppers
    if not keys or not (by_all or by_group):
        return None
    who = "everybody on this machine" if by_all else "who may drop files (the inbox has the same group)"
    named = " and ".join(keys)
    files = " and ".join(f"{key}_file" for section, key in SECRET_KEYS if f"{key} under [{section}]" in keys)
    return f"{named} in {config.file} can be read by {who}: set {files} instead, a file with the mode 0600"


def _folder(name: str, path: Path) -> Check:
    folder = nearest(path)
    if not folder.is_dir():
        return False, name, f"{folder} is a file: move it away, or set another {name}"
    if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        return False, name, f"{folder} cannot be written by this user: change its owner or rights"
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


def _model(config: Config, name: str) -> Iterator[Check]:
    try:
        looked = model_files.look(config.spec(name))
    except FramePackError as error:
        yield False, f"model {name}", str(error)
        return
    yield True, f"model {name}", "all its files are here, and they fit together"
    for found in looked.values():
        if found.warning:
            yield "warning", f"model {name}", found.warning


def _loras(config: Config) -> Check:
    try:
        for entry in JobSettings(**config.defaults).loras:
            loras.find(entry.file, config.lora_dir)
    except RequestError as error:
        return False, "lora_dir", f"[defaults] {error}"
    return None, "lora_dir", f"{config.lora_dir}: {loras.listing(config.lora_dir)}"


def _preview_decoder(file: Path, *, whole: bool) -> Check:
    """Check the tiny decoder's file; ``whole`` loads it, which needs torch."""
    try:
        taehv_files.check_file(file)
        if whole:
            from framepack_core.networks.taehv import TinyDecoder

            TinyDecoder.load(file)
    except FramePackError as error:
        return False, "preview_decoder", str(error)
    return True, "preview_decoder", str(file)


def _disk(path: Path) -> Check:
    folder = nearest(path)
    free = shutil.disk_usage(folder).free
    if free < DISK_RESERVE_BYTES:
        return False, "disk", f"{free / 2**30:.1f} GiB free in {folder}: make room, 2 GiB are needed"
    return True, "disk", f"{free / 2**30:.0f} GiB free"


def _device(config: Config, name: str) -> Iterator[Check]:
    from framepack_core.memory import device_support, devices
    from framepack_core.networks.attention import choose_attention

    try:
        device = devices.choose_device(name, gpu_expected=is_gpu_expected(config.model, config))
        transformer, encoders = devices.choose_dtypes(device, config.gpu.dtype)
        attention = choose_attention(config.gpu.attention, device)
    except FramePackError as error:
        yield False, "device", str(error)
        return
    dtypes = f"transformer {transformer}, encoders and VAE {encoders}".replace("torch.", "")
    if transformer == encoders:
        dtypes = f"all in {transformer}".replace("torch.", "")
    yield True, "attention", "native: torch's own" if attention == "native" else attention
    if config.gpu.compile is True or (config.gpu.compile == "auto" and device.type == "cuda"):
        yield _compiling(config, device, transformer, attention)
    card = devices.card(device)
    if card is None:
        small = config.model == "demo"
        note = "" if small else ": the full models take days a video here; a CUDA GPU is needed"
        yield small or None, "device", f"cpu, {dtypes}{note}"
        return
    yield True, "device", f"{devices.describe(device)}, {card.free / GIB:.0f} GiB free, {dtypes}"
    for warning in device_support.warnings(device, transformer):
        yield "warning", "device", warning


def _compiling(config: Config, device: "torch.device", dtype: "torch.dtype", attention: str) -> Check:
    """Check what compiling needs, and whether it has failed before."""
    from framepack_core.networks import compiling

    wanted, precision = config.gpu.compile, config.gpu.precision
    if lacking := compiling.missing(device, dtype, precision):
        return False if wanted is True else "warning", "compile", f"{SLOWER}: needs {lacking}"
    known = JobStore(config.database, read_only=True).uncompiled() if config.database.exists() else {}
    failed = known.get(compiling.conditions(device, dtype, precision, attention))
    if failed and wanted == "auto":
        return "warning", "compile", f"{SLOWER}: it failed ({failed}); compile = true tries again"
    which = "all videos" if wanted is True else f"videos of {compiling.WORTH_SECTIONS} sections and more"
    return True, "compile", which


@dataclass(frozen=True)
class Forecast:
    """A memory plan, and what it was made for."""

    model: str
    weights: Weights
    card: Card | None
    host: Host
    video: Video  # the largest by the config's defaults
    plan: Plan
    workers: int  # each with such a plan, at the same time

    @property
    def shortage(self) -> str | None:
        """What there is too little of, for one worker or for all of them; None if there is enough."""
        together = self.workers * self.plan.ram
        if self.plan.shortage is not None or together <= self.host.available:
            return self.plan.shortage
        return (
            f"{self.workers} workers together need {together / GIB:.1f} GiB of the host's memory, and "
            f"{self.host.available / GIB:.1f} are available: name fewer devices under [gpu]"
        )


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
    elif gpu and config.gpu.devices:
        from framepack_core.memory import devices

        device = devices.choose_device(config.gpu.devices[0], gpu_expected=is_gpu_expected(spec.name, config))
        card = devices.card(device)
        transformer, encoders = devices.choose_dtypes(device, config.gpu.dtype)
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
    merged = [loras.opened(entry, config.lora_dir) for entry in settings.loras]
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
    return Forecast(spec.name, weights, card, host, video, plan, len(config.gpu.devices))
