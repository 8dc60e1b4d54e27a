"""Resolves a job's settings, pictures, size and length from its files and the defaults."""

import contextlib
import hashlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from framepack_core.errors import RequestError
from framepack_core.media.sizes import Size, covering_size, output_size
from framepack_core.models.registry import ModelSpec, of_kind
from framepack_core.request import WHITE
from framepack_core.sections import FPS, Kind, frame_count, section_count, sections_of
from framepackd import files
from framepackd.inbox.inspect import picture_size, read_comment
from framepackd.intake.differences import read_differences
from framepackd.intake.extend import Record, choose_model, look, read_record
from framepackd.intake.variations import seed_in
from framepackd.jobs import embedded
from framepackd.jobs.database import StoreError
from framepackd.jobs.job import Job, State
from framepackd.jobs.store import JobStore
from framepackd.settings import loras
from framepackd.settings.config import Config
from framepackd.settings.decoding import as_text
from framepackd.settings.job_settings import JobSettings, parse_settings, read_settings_file
from framepackd.text import printable, taken_name

log = logging.getLogger(__name__)

MAX_TEXT_BYTES = 1 << 16
ADDED_SETTINGS = ("prompts", "more", "continues")
MAX_FRAMES = 256  # of a chain; each is decoded once at intake, which takes up to 0.2 s of the daemon's time


class Look(NamedTuple):
    """What was found of a picture."""

    size: Size
    passed_over: list[str]  # in words


Looks = dict[str, Look]  # by SHA-256


def resolve(
    job: Job,
    inputs: Path,
    manifest: dict[str, Any],
    config: Config,
    store: JobStore,
    looks: Looks | None = None,
) -> JobSettings | None:
    """Work out from a job's files what is to be made; if nothing can, its end is decided in ``delivery``.

    Gives the settings, if they can be read: where they ask for several seeds, the job is to become several.
    ``looks`` are what was found of pictures that were looked at; variations have the same.
    """
    try:
        settings = _resolve(job, inputs, manifest, config, {} if looks is None else looks)
        skips = config.on_duplicate == "skip" and settings.seeds == 1
        earlier = store.find_done(job.fingerprint) if skips else None
        if earlier is not None:
            job.delivery = {
                "state": State.SKIPPED,
                "error": f"the same as job {earlier.id}: {earlier.output}",
            }
    except RequestError as error:
        job.delivery = {"state": State.FAILED, "error": printable(str(error))}
    except OSError as error:
        name = Path(error.filename or inputs).name
        remedy = "correct its permissions and drop the files again"
        reason = f"{name} cannot be read ({error.strerror}): {remedy}"
        job.delivery = {"state": State.FAILED, "error": printable(reason)}
    except StoreError:
        raise
    except Exception as error:
        # Whatever a file can do to us, it must not stop the queue, now or at the next start.
        log.exception("job %s: %s cannot be taken in", job.id, job.path)
        reason = f"an error of framepackd's own ({type(error).__name__}: {error}): please report it"
        job.delivery = {"state": State.FAILED, "error": printable(reason)}
    else:
        return settings
    return None


def _resolve(job: Job, inputs: Path, manifest: dict[str, Any], config: Config, looks: Looks) -> JobSettings:
    _note_inputs(job, inputs, manifest)
    record = read_record(inputs / job.inputs["record"]["file"]) if "record" in job.inputs else Record({})
    own = _own_settings(inputs, job)
    settings, origins = _settings(inputs, manifest, job, config, own, record)
    settings = _with_seed(settings, manifest, job)
    with _named(origins.get("model")):
        spec = config.spec(_choose_model(settings, own, job, record, config))
    pictures = _pictures_that_count(job, record)
    keyframes = _keyframes(pictures, job, settings)
    _refuse_what_the_model_cannot(spec, pictures, job, keyframes, config)
    for picture in pictures.values():
        _look_at(inputs, picture, looks)
    shapes = [looks[picture["sha256"]].size for picture in pictures.values()]
    source = look(inputs, job, record, str(spec.base)) if "video" in job.inputs else None
    if source is not None:
        shapes.insert(0, source.video.size)
    job.height, job.width = output_size(settings, shapes[0], spec.buckets)
    if source is not None:
        job.height, job.width = source.decided((job.height, job.width), job, own)
    for shape in shapes:
        covering_size(shape, (job.height, job.width))
    seconds = settings.seconds if source is None or settings.more is None else settings.more
    sections = section_count(seconds, settings.latent_window_size)
    job.sections = job.clips * sections
    _refuse_keyframes_behind(job.sections, keyframes)
    # Each clip begins with the frame that the one before ends with.
    before = source.video.frames - 1 if source else 0
    job.frames = before + job.clips * (frame_count(sections, settings.latent_window_size) - 1) + 1
    job.steps_total = job.sections * settings.steps
    with _named(origins.get("prompts")):
        prompts = _timed_prompts(settings, spec.kind, sections, job.clips, before / FPS, seconds)
    with _named(origins.get("loras")):
        taken = loras.take_in(settings.loras, config.lora_dir, spec)
    job.settings = settings.model_dump(mode="json", exclude={"seeds"}) | {
        "model": spec.name,
        "width": job.width,
        "height": job.height,
        "prompts": prompts,
        "more": settings.more if source else None,  # of a folder's pictures it says nothing
        "continues": source.as_json(job) if source else None,
        "keyframes": {str(number): file for number, file in keyframes.items()},
        "loras": taken,
    }
    job.fingerprint = _fingerprint(job)
    return settings


def _look_at(inputs: Path, picture: dict[str, Any], looks: Looks) -> None:
    """Look at a picture, unless it was, and record what of it is passed over."""
    sha256 = picture["sha256"]
    if sha256 not in looks:
        told: list[str] = []
        looks[sha256] = Look(picture_size(inputs / picture["file"], told.append), told)
    for text in looks[sha256].passed_over:
        log.warning("%s", printable(text))
    if looks[sha256].passed_over:
        picture["passed_over"] = [printable(text) for text in looks[sha256].passed_over]


def _note_inputs(job: Job, inputs: Path, manifest: dict[str, Any]) -> None:
    """Note what was dropped, with what it holds."""
    job.inputs = {entry["role"]: {"file": taken_name(entry), "sha256": None} for entry in manifest["files"]}
    for entry in job.inputs.values():
        entry["sha256"] = files.sha256(inputs / entry["file"])
    if "diff" in job.inputs:
        job.inputs["diff"]["values"] = read_differences(inputs / job.inputs["diff"]["file"])
    if job.clips >= MAX_FRAMES:
        raise RequestError(
            f"{job.name} is a chain of {job.clips + 1} frames, of which one may have {MAX_FRAMES}: "
            "drop it as several, each beginning with the frame that the one before ends with"
        )


def _with_seed(settings: JobSettings, manifest: dict[str, Any], job: Job) -> JobSettings:
    """Fix the seed, unless several jobs are asked for."""
    # A variation is one, also when it is dropped again with the settings of all.
    seed = manifest.get("seed", seed_in(job.name) if settings.seeds > 1 else None)
    if seed is not None:
        settings = settings.model_copy(update={"seed": seed, "seeds": 1})
    return settings.with_drawn_seed() if settings.seeds == 1 else settings


def _choose_model(
    settings: JobSettings, own: dict[str, Any], job: Job, record: Record, config: Config
) -> str:
    name = config.model if settings.model is None else settings.model
    if name not in config.model_names():
        raise RequestError(config.unknown_model(name))
    return choose_model(own.get("model"), name, record, config) if "video" in job.inputs else name


def _pictures_that_count(job: Job, record: Record) -> dict[str, Any]:
    """Give the pictures by role; what a video was made to arrive at says nothing of what is added to it."""
    return {
        role: job.inputs[role]
        for role in _pictures(job)
        if "video" not in job.inputs or role == "image" or job.inputs[role]["sha256"] not in record.pictures
    }


def _refuse_what_the_model_cannot(
    spec: ModelSpec, pictures: dict[str, Any], job: Job, keyframes: dict[int, str], config: Config
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
        continues="video" in job.inputs,
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


def _own_settings(inputs: Path, job: Job) -> dict[str, Any]:
    """Give what NAME.toml sets."""
    if "settings" not in job.inputs:
        return {}
    file = job.inputs["settings"]["file"]
    return read_settings_file(inputs / file, file)


def _embedded(inputs: Path, job: Job) -> dict[str, Any]:
    """Give what a video of ours, dropped beside the picture, says of how it was made."""
    if "recipe" not in job.inputs:
        return {}
    file = job.inputs["recipe"]["file"]
    said = embedded.read(read_comment(inputs / file))
    return embedded.settings_of(said, file) if said is not None else {}


def _settings(
    inputs: Path, manifest: dict[str, Any], job: Job, config: Config, own: dict[str, Any], record: Record
) -> tuple[JobSettings, dict[str, str]]:
    """Lay the settings over each other: config, defaults of the folders, the job's own, and its text.

    Gives them, and for each key that is set the name of where.
    """
    layers = [("[defaults]", config.defaults)]
    for path in manifest["defaults"]:
        with contextlib.suppress(FileNotFoundError):  # taken away since
            folder, _, name = path.rpartition("/")
            with files.folder_below(config.inbox, folder) as opened:
                layers.append((path, read_settings_file(opened / name, path)))
    layers += [
        (_file_of("record", job), record.settings),
        (_file_of("recipe", job), _embedded(inputs, job)),
        (_file_of("settings", job), own),
    ]
    if "text" in job.inputs:
        prompt = _read_prompt(inputs / job.inputs["text"]["file"])
        if not prompt and "prompt" not in own:
            raise RequestError(
                f"{job.inputs['text']['file']} is empty: write what is to happen, or, for no prompt at all, "
                f'put prompt = "" into {job.name}.toml'
            )
        if prompt:
            layers.append((_file_of("text", job), {"prompt": prompt}))
    merged: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for origin, layer in layers:
        if "resolution" in layer:  # the nearer wish counts, whichever way the size is said
            merged = {key: value for key, value in merged.items() if key not in ("width", "height")}
        merged |= layer
        origins |= dict.fromkeys(layer, origin)
    settings = JobSettings.model_validate(parse_settings(merged, f"the settings of {job.name} together"))
    if settings.prompt is None:
        raise RequestError(f"{job.name} has no prompt: add {job.name}.txt")
    return settings, origins


def _file_of(role: str, job: Job) -> str:
    return str(job.inputs[role]["file"]) if role in job.inputs else ""


@contextlib.contextmanager
def _named(origin: str | None) -> Iterator[None]:
    """Say in an error where what is wrong was set, if it was set anywhere."""
    try:
        yield
    except RequestError as error:
        raise RequestError(f"{origin}: {error}" if origin else str(error)) from error


def _read_prompt(path: Path) -> str:
    if path.stat().st_size > MAX_TEXT_BYTES:
        raise RequestError(f"{path.name} has {path.stat().st_size} bytes: a prompt may have {MAX_TEXT_BYTES}")
    return as_text(path.read_bytes(), path.name).replace("\r\n", "\n").strip()


def _pictures(job: Job) -> list[str]:
    """Give the roles of a job's pictures; the first one decides the size."""
    return [role for role in job.inputs if role.startswith(("image", "frame-", "end", "keyframe-"))]


def _keyframes(pictures: dict[str, Any], job: Job, settings: JobSettings) -> dict[int, str]:
    """Give the files of a job's keyframes by section."""
    files = {
        int(role.removeprefix("keyframe-")): entry["file"]
        for role, entry in pictures.items()
        if role.startswith("keyframe-")
    }
    for number, file in settings.keyframes.items():
        if number not in files:
            raise RequestError(
                f"keyframes names {file}, and no such picture came with {job.name}.toml: "
                "correct the name, or drop the picture too"
            )
    return files


def _fingerprint(job: Job) -> str:
    """Hash what decides the result: pictures, prompt, settings and the content of LoRAs."""
    roles = [*_pictures(job), *(role for role in ("video", "latents") if role in job.inputs)]
    pictures = {role: job.inputs[role]["sha256"] for role in roles}
    settings = {key: value for key, value in job.settings.items() if key != "keyframes"}  # only their names
    # What came later counts only where it is used: earlier jobs are still recognised.
    settings = loras.decisive(settings)
    settings.pop("embed_metadata")  # the pictures are the same
    settings = {key: value for key, value in settings.items() if value or key not in ADDED_SETTINGS}
    if settings.get("background") == WHITE:
        del settings["background"]
    decisive = json.dumps([pictures, settings], sort_keys=True)
    return hashlib.sha256(decisive.encode()).hexdigest()
