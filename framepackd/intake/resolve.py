"""Resolves a job's settings, pictures, size and length from its files and the defaults."""

import contextlib
import hashlib
import json
import logging
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from framepack_core.errors import RequestError
from framepack_core.media.sizes import Size, covering_size, output_size
from framepack_core.models.registry import ModelSpec, of_kind
from framepack_core.request import WHITE
from framepack_core.sections import FPS, Kind, frame_count, section_count, sections_of
from framepackd import files
from framepackd.inbox.inspect import picture_size, read_comment
from framepackd.intake import drafting
from framepackd.intake.differences import read_differences
from framepackd.intake.extend import SourceRecord, choose_model, read_record, read_source
from framepackd.intake.variations import seed_in
from framepackd.jobs import drafts, embedded
from framepackd.jobs.database import StoreError
from framepackd.jobs.folder import INPUTS, Manifest
from framepackd.jobs.job import Decision, Input, State, clips_of
from framepackd.jobs.store import JobStore
from framepackd.settings import loras
from framepackd.settings.config import Config
from framepackd.settings.decoding import read_prompt
from framepackd.settings.job_settings import JobSettings, parse_settings, read_settings_file
from framepackd.text import printable

log = logging.getLogger(__name__)

ADDED_SETTINGS = ("prompts", "more", "continues")
MAX_FRAMES = 256  # of a chain; each is decoded once at intake, which takes up to 0.2 s of the daemon's time


class PictureRead(NamedTuple):
    """What reading a picture gave."""

    size: Size
    passed_over: list[str]  # in words


PicturesRead = dict[str, PictureRead]  # by SHA-256


@dataclass(frozen=True)
class Resolved:
    """What is to be made of dropped files, as the columns of a job's row hold it."""

    inputs: dict[str, Input]
    delivery: Decision | None = None  # set if the job is not to run: it has failed, or is skipped
    settings: dict[str, Any] = field(default_factory=dict)
    fingerprint: str = ""
    width: int = 0
    height: int = 0
    frames: int = 0
    sections: int = 0
    steps_total: int = 0
    seeds: int = 1  # if more, the job is to become that many; no column

    def columns(self) -> dict[str, Any]:
        """Give the columns of the job's row, by name."""
        return {each.name: getattr(self, each.name) for each in fields(self) if each.name != "seeds"}


@dataclass(frozen=True)
class _Dropped:
    """The files of a job in its work folder."""

    folder: Path
    manifest: Manifest
    inputs: dict[str, Input]

    def file(self, role: str) -> str:
        """Give the name of the file of a role; empty if there is none."""
        return self.inputs[role]["file"] if role in self.inputs else ""

    def path(self, role: str) -> Path | None:
        """Give the path of the file of a role; None if there is none."""
        return self.folder / self.file(role) if role in self.inputs else None


def resolve(
    work: Path, manifest: Manifest, config: Config, store: JobStore, pictures: PicturesRead | None = None
) -> Resolved:
    """Work out from the files in a work folder what is to be made; if nothing can, ``delivery`` says why.

    ``pictures`` are those that were read already and gets those that are read now: variations share them.

    Raises:
        StoreError: the database cannot be used.
    """
    inputs: dict[str, Input] = {
        file.role: {"file": file.taken_name, "sha256": None} for file in manifest.files
    }
    dropped = _Dropped(work / INPUTS, manifest, inputs)
    resolved = Resolved(inputs)
    try:
        _read_inputs(dropped)
        for known in _resolve(dropped, config, {} if pictures is None else pictures):
            resolved = known  # if a later step raises, the failed job keeps this
        skips = config.on_duplicate == "skip" and resolved.seeds == 1
        earlier = store.find_done(resolved.fingerprint) if skips else None
    except RequestError as error:
        reason = str(error)
    except OSError as error:
        name = Path(error.filename or dropped.folder).name
        remedy = "correct its permissions and drop the files again"
        reason = f"{name} cannot be read ({error.strerror}): {remedy}"
    except StoreError:
        raise
    except Exception as error:
        # Whatever a file can do to us, it must not stop the queue, now or at the next start.
        log.exception("job %s: %s cannot be taken in", work.name, printable(manifest.name))
        reason = f"an error of framepackd's own ({type(error).__name__}: {error}): please report it"
    else:
        if earlier is None:
            return resolved
        same = f"the same as job {earlier.id}: {earlier.output}"
        return replace(resolved, delivery={"state": State.SKIPPED, "error": same})
    return replace(resolved, delivery={"state": State.FAILED, "error": printable(reason)})


def _read_inputs(dropped: _Dropped) -> None:
    """Hash the files, and read the differences of the pictures."""
    for entry in dropped.inputs.values():
        entry["sha256"] = files.sha256(dropped.folder / entry["file"])
    if differences := dropped.path("diff"):
        dropped.inputs["diff"]["values"] = read_differences(differences)
    frames = clips_of(dropped.inputs) + 1
    if frames > MAX_FRAMES:
        raise RequestError(
            f"{dropped.manifest.name} is a chain of {frames} frames, of which one may have {MAX_FRAMES}: "
            "drop it as several, each beginning with the frame that the one before ends with"
        )


def _resolve(dropped: _Dropped, config: Config, pictures_read: PicturesRead) -> Iterator[Resolved]:
    """Yield what is known of the job: its size, then its length, then all."""
    inputs, record_file, video = dropped.inputs, dropped.path("record"), dropped.path("video")
    record = read_record(record_file) if record_file else SourceRecord({})
    own_file = dropped.path("settings")
    own = read_settings_file(own_file, own_file.name) if own_file else {}
    draft = drafting.draft_of(dropped.path(drafts.ROLE), dropped.path("recipe"))
    settings, origins = _settings(dropped, config, own, record, draft)
    settings, final = drafting.as_draft(settings, config)
    with _named(origins.get("model")):
        spec = config.spec(_choose_model(settings, own, inputs, record, config))
    pictures = _pictures_that_count(inputs, record)
    keyframes = _keyframes(pictures, settings, dropped.manifest.name)
    _refuse_what_the_model_cannot(spec, inputs, pictures, keyframes, config)
    shapes = [_read_picture(dropped.folder, picture, pictures_read).size for picture in pictures.values()]
    source = read_source(video, dropped.path("latents"), record, str(spec.base)) if video else None
    if source is not None:
        shapes.insert(0, source.video.size)
    size = output_size(settings, shapes[0], spec.buckets)
    if source is not None:
        size = source.decided(size, own)
    height, width = size
    resolved = Resolved(inputs, width=width, height=height)
    yield resolved
    for shape in shapes:
        covering_size(shape, size)
    seconds = settings.seconds if source is None or settings.more is None else settings.more
    sections, clips = section_count(seconds, settings.latent_window_size), clips_of(inputs)
    # Each clip begins with the frame that the one before ends with.
    before = source.video.frames - 1 if source else 0
    resolved = replace(
        resolved,
        frames=before + clips * (frame_count(sections, settings.latent_window_size) - 1) + 1,
        sections=clips * sections,
        steps_total=clips * sections * settings.steps,
    )
    yield resolved
    _refuse_keyframes_behind(clips * sections, keyframes)
    with _named(origins.get("prompts")):
        prompts = _timed_prompts(settings, spec.kind, sections, clips, before / FPS, seconds)
    with _named(origins.get("loras")):
        taken = loras.take_in(settings.loras, config.lora_dir, spec)
    recorded = settings.model_dump(mode="json", exclude={"seeds"}) | {
        "model": spec.name,
        "width": width,
        "height": height,
        "prompts": prompts,
        "more": settings.more if source else None,  # of a folder's pictures it says nothing
        "continues": {**inputs["video"], **source.facts} if source else None,
        "keyframes": {str(number): file for number, file in keyframes.items()},
        "loras": taken,
        "final": final,
        "draft_of": draft.said if draft else None,
    }
    yield replace(
        resolved, settings=recorded, fingerprint=fingerprint(inputs, recorded), seeds=settings.seeds
    )


def _read_picture(folder: Path, picture: Input, pictures_read: PicturesRead) -> PictureRead:
    """Read a picture, unless it was, and record what of it is passed over."""
    sha256 = picture["sha256"]
    assert sha256 is not None  # all files have been read
    if sha256 not in pictures_read:
        passed_over: list[str] = []
        size = picture_size(folder / picture["file"], passed_over.append)
        pictures_read[sha256] = PictureRead(size, [printable(text) for text in passed_over])
    read = pictures_read[sha256]
    for text in read.passed_over:
        log.warning("%s", text)
    if read.passed_over:
        picture["passed_over"] = read.passed_over
    return read


def _choose_model(
    settings: JobSettings,
    own: Mapping[str, Any],
    roles: Collection[str],
    record: SourceRecord,
    config: Config,
) -> str:
    name = config.model if settings.model is None else settings.model
    if name not in config.model_names():
        raise RequestError(config.unknown_model(name))
    return choose_model(own.get("model"), name, record, config) if "video" in roles else name


def _pictures_that_count(inputs: dict[str, Input], record: SourceRecord) -> dict[str, Input]:
    """Give the pictures by role; what a video was made to arrive at says nothing of what is added to it."""
    return {
        role: inputs[role]
        for role in _pictures(inputs)
        if "video" not in inputs or role == "image" or inputs[role]["sha256"] not in record.pictures
    }


def _refuse_what_the_model_cannot(
    spec: ModelSpec,
    roles: Collection[str],
    pictures: Collection[str],
    keyframes: dict[int, str],
    config: Config,
) -> None:
    others = config.specs()
    if "frame-0" in pictures and spec.kind == "f1":
        raise RequestError(
            f"model {spec.name} generates forward and cannot aim at the next frame of a chain: "
            f"use {of_kind('framepack', others)}"
        )
    spec.verify(
        end_image="end" in pictures,
        keyframes=bool(keyframes),
        continues="video" in roles,
        others=others,
    )


def _refuse_keyframes_behind(sections: int, keyframes: dict[int, str]) -> None:
    last = max(keyframes, default=0)
    if last >= sections:
        raise RequestError(
            f"{keyframes[last]} is for section {last}, but the video has {sections}: "
            f"0, its end, to {sections - 1}; sections are counted as they are made"
        )


def _timed_prompts(
    settings: JobSettings, kind: Kind, sections: int, clips: int, before: float, seconds: float
) -> list[dict[str, Any]]:
    """Give the timed prompts, each with the sections in which it acts; ``before``: seconds that are there."""
    window = settings.latent_window_size
    acting = sections_of(settings.prompts, kind, sections, window, asked=seconds, before=before, clips=clips)
    return [
        {**timed.model_dump(), "sections": numbers}
        for timed, numbers in zip(settings.prompts, acting, strict=True)
    ]


def _settings(
    dropped: _Dropped, config: Config, own: dict[str, Any], record: SourceRecord, draft: drafts.Draft | None
) -> tuple[JobSettings, dict[str, str]]:
    """Lay the settings over each other: config, defaults of the folders, the job's own, and its text.

    Gives them, the seed chosen if it is one job, and for each key that is set the name of where.
    """
    name = dropped.manifest.name
    layers = [("[defaults]", config.defaults)]
    for path in dropped.manifest.defaults:
        with contextlib.suppress(FileNotFoundError):  # taken away since
            folder, _, file = path.rpartition("/")
            with files.folder_below(config.inbox, folder) as opened:
                layers.append((path, read_settings_file(opened / file, path)))
    layers += [
        (dropped.file("record"), record.settings),
        (dropped.file("recipe"), _embedded(dropped.path("recipe"))),
        (dropped.file(drafts.ROLE) or dropped.file("recipe"), drafting.of_draft(draft, name)),
        (dropped.file("settings"), drafting.of_own_file(own, draft)),
    ]
    if text := dropped.path("text"):
        prompt = read_prompt(text)
        if not prompt and "prompt" not in own:
            raise RequestError(
                f"{text.name} is empty: write what is to happen, or, for no prompt at all, "
                f'put prompt = "" into {name}.toml'
            )
        if prompt:
            layers.append((text.name, {"prompt": prompt}))
    merged: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for origin, layer in layers:
        if "resolution" in layer:  # the nearer wish counts, whichever way the size is said
            merged = {key: value for key, value in merged.items() if key not in ("width", "height")}
        merged |= layer
        origins |= dict.fromkeys(layer, origin)
    settings = JobSettings.model_validate(parse_settings(merged, f"the settings of {name} together"))
    if settings.prompt is None:
        raise RequestError(f"{name} has no prompt: add {name}.txt")
    return _with_seed(settings, dropped.manifest), origins


def _with_seed(settings: JobSettings, manifest: Manifest) -> JobSettings:
    """Fix the seed, unless several jobs are asked for."""
    seed = manifest.seed
    if seed is None and settings.seeds > 1:  # a variation that is dropped again with the settings of all
        seed = seed_in(manifest.name)
    if seed is not None:
        settings = settings.model_copy(update={"seed": seed, "seeds": 1})
    return settings.with_drawn_seed() if settings.seeds == 1 else settings


def _embedded(video: Path | None) -> dict[str, Any]:
    """Give the settings in the metadata of a video of ours that was dropped beside the picture."""
    said = embedded.read(read_comment(video)) if video else None
    return embedded.settings_of(said, video.name) if video and said is not None else {}


@contextlib.contextmanager
def _named(origin: str | None) -> Iterator[None]:
    """Say in an error where what is wrong was set, if it was set anywhere."""
    try:
        yield
    except RequestError as error:
        raise RequestError(f"{origin}: {error}" if origin else str(error)) from error


def _pictures(roles: Collection[str]) -> list[str]:
    """Give the roles of a job's pictures; the first one decides the size."""
    return [role for role in roles if role.startswith(("image", "frame-", "end", "keyframe-"))]


def _keyframes(pictures: dict[str, Input], settings: JobSettings, name: str) -> dict[int, str]:
    """Give the files of a job's keyframes by section."""
    found = {
        int(role.removeprefix("keyframe-")): entry["file"]
        for role, entry in pictures.items()
        if role.startswith("keyframe-")
    }
    for number, file in settings.keyframes.items():
        if number not in found:
            raise RequestError(
                f"keyframes names {file}, and no such picture came with {name}.toml: "
                "correct the name, or drop the picture too"
            )
    return found


def fingerprint(inputs: Mapping[str, Input], settings: Mapping[str, Any]) -> str:
    """Hash what decides a job's result: pictures, prompt, settings and the content of LoRAs."""
    roles = [*_pictures(inputs), *(role for role in ("video", "latents") if role in inputs)]
    pictures = {role: inputs[role]["sha256"] for role in roles}
    # What came later counts only where it is used: earlier jobs are still recognised.
    decisive = {
        key: value
        for key, value in loras.decisive(settings).items()
        # Names of pictures; the bits are the same with and without.
        if key not in ("keyframes", "embed_metadata", "draft", "final", "draft_of")
        and (value or key not in ADDED_SETTINGS)
        and (key, value) != ("background", WHITE)
    }
    return hashlib.sha256(json.dumps([pictures, decisive], sort_keys=True).encode()).hexdigest()
