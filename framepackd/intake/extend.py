"""Prepares a job that extends a finished video, by its NAME.json or its frames.

It was dropped as ``NAME.mp4`` with ``more`` in ``NAME.toml``. It is extended from its latents if they were
dropped with it, else from its last frames. None of these files is trusted.
"""

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from framepack_core.errors import FramePackError, RequestError
from framepack_core.media import extend
from framepack_core.media.extend import LATENT_PIXELS, Footage
from framepack_core.media.sizes import Size
from framepack_core.models.registry import BUNDLED, find
from framepackd.inbox.inspect import look_at_video
from framepackd.jobs import embedded
from framepackd.settings.config import Config
from framepackd.settings.job_settings import parse_settings

MAX_RECORD_BYTES = 1 << 18  # a job's record has about 5 KiB besides its prompts
# The settings used from NAME.json; its length and timed prompts are those of the existing part.
TAKEN_OVER = (
    *("prompt", "negative_prompt", "seed", "latent_window_size", "steps", "true_cfg_scale", "guidance_scale"),
    *("guidance_rescale", "cache", "crf", "save_section_frames", "keep_latents", "width", "height", "loras"),
    "background",
)


@dataclass(frozen=True)
class SourceRecord:
    """What NAME.json says of the video that a job extends."""

    settings: dict[str, Any]
    model: str | None = None
    base: str | None = None  # the source of its VAE
    pictures: frozenset[str] = frozenset()  # SHA-256 of the files it was made from


def read_record(path: Path) -> SourceRecord:
    """Read the known keys of a NAME.json.

    Raises:
        RequestError: it is too large, not JSON, or one of its settings is wrong.
    """
    if path.stat().st_size > MAX_RECORD_BYTES:
        raise RequestError(f"{path.name} has more than {MAX_RECORD_BYTES} bytes: leave it out")
    try:
        said = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{path.name} is not JSON ({str(error)[:100]}): leave it out") from error
    if not isinstance(said, dict):
        raise RequestError(f"{path.name} is not what is delivered beside a video: leave it out")
    known = {key: said[key] for key in TAKEN_OVER if said.get(key) is not None}
    if isinstance(known.get("loras"), list):
        known["loras"] = [embedded.only(entry, embedded.LORA_KEYS) for entry in known["loras"]]
    sources, inputs = said.get("model_sources"), said.get("inputs")
    entries = inputs.values() if isinstance(inputs, dict) else ()
    hashes = (_text(entry.get("sha256")) for entry in entries if isinstance(entry, dict))
    return SourceRecord(
        settings=parse_settings(known, path.name),
        model=_text(said.get("model")),
        base=_text(sources.get("base")) if isinstance(sources, dict) else None,
        pictures=frozenset(filter(None, hashes)),
    )


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def choose_model(named: str | None, otherwise: str, record: SourceRecord, config: Config) -> str:
    """Choose the model that extends a video: the one that the job names, else one of kind f1 that is here.

    Args:
        named: by the job's own settings.
        otherwise: the model that a job with a picture would use.
        record: of the video.
        config: with the models.

    Raises:
        RequestError: no model of kind f1 is here.
    """
    if named is not None:
        return named
    for name in (record.model, otherwise):
        if name in config.model_names() and config.spec(name).kind == "f1":
            return name
    for name in sorted(config.model_names(), key=lambda name: name not in config.models):
        # The bundled models are toys: they extend their own videos, and substitute for no other model.
        fits = name not in BUNDLED or BUNDLED & {record.model, otherwise}
        if fits and config.spec(name).kind == "f1" and _is_here(name, config):
            return name
    raise RequestError(
        f"extending needs a model of kind f1, and {otherwise} is of kind {config.spec(otherwise).kind}: "
        'run framepackd models download f1, or set model = "…" in NAME.toml to one of your own'
    )


def _is_here(name: str, config: Config) -> bool:
    try:
        find(config.spec(name))
    except FramePackError:
        return False
    return True


@dataclass(frozen=True)
class SourceVideo:
    """The video that a job extends."""

    file: str
    video: Footage
    latents: int | None  # how many of its last latents are there; None: it is extended from its frames
    size: Size  # of what is added, if it is extended from latents

    def decided(self, size: Size, own: Collection[str]) -> Size:
        """Give the size of what is added: that of the latents, or else ``size``.

        Raises:
            RequestError: the job's ``own`` settings set another than that of the latents.
        """
        if self.latents is None:
            return size
        if size != self.size and not {"width", "height", "resolution"}.isdisjoint(own):
            raise RequestError(
                f"{self.file} is of {self.size[1]}x{self.size[0]}, from its latents it "
                f"cannot be extended at {size[1]}x{size[0]}: leave the size out, or leave out the latents"
            )
        return self.size

    @property
    def facts(self) -> dict[str, int | None]:
        """What the job's record says of it, besides what it says of each input."""
        return {"frames": self.video.frames, "latents": self.latents}


def read_source(file: Path, latents: Path | None, record: SourceRecord, base: str) -> SourceVideo:
    """Read the facts of a video and of its latents, if there are any.

    Raises:
        RequestError: it cannot be extended, or they are not its latents.
    """
    video = look_at_video(file)
    if latents is None:
        return SourceVideo(file.name, video, None, video.size)
    frames, rows, columns = extend.latents_shape(latents)
    size = rows * LATENT_PIXELS, columns * LATENT_PIXELS
    if size != video.size or extend.frames_of(frames) > video.frames:
        raise RequestError(
            f"{latents.name} is of {extend.frames_of(frames)} frames of {size[1]}x{size[0]}, {file.name} has "
            f"{video.frames} of {video.width}x{video.height}: they do not belong together: "
            f"{extend.NO_LATENTS}"
        )
    if record.base is not None and record.base != base:
        raise RequestError(
            f"{latents.name} was made with {record.base}, not with {base}: {extend.NO_LATENTS}"
        )
    return SourceVideo(file.name, video, frames, size)
