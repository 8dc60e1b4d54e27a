"""From settled files in the inbox to a job: take the files, check them, record the job.

Order matters: a manifest says what is to be taken; the files get hidden names in their folder, and are nobody
else's any more; they are copied, because others may hold a link to one or have it open; the hidden ones are
removed; the row is written. What a crash leaves in between is finished at the next start.
"""

import contextlib
import hashlib
import json
import logging
import secrets
import shutil
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from framepack_core.buckets import covering_size, output_size
from framepack_core.errors import RequestError
from framepack_core.sections import frame_count, section_count
from framepackd import files, loras
from framepackd.config import Config
from framepackd.database import ENDED, Job, State, StoreError, utc_now
from framepackd.differences import read_differences
from framepackd.inbox import Group
from framepackd.jobs import JobStore
from framepackd.listing import Signature
from framepackd.names import printable
from framepackd.pictures import picture_size
from framepackd.settings import JobSettings, parse_settings, read_settings_file

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
INPUTS = "inputs"
CHECKPOINT = "checkpoint"  # what the worker goes on from
PREVIEW = "preview.mp4"  # what exists of the video
KEPT_DAYS = 7  # a failed job's checkpoint, counted at the start of a daemon
MAX_TEXT_BYTES = 1 << 16


class ChangedError(OSError):
    """A file is not any more what had settled."""


def take(group: Group, config: Config, store: JobStore) -> Job:
    """Take a settled group out of the inbox and record its job.

    A mistake in the files makes a job that fails with the reason.

    Raises:
        ChangedError: a file has changed since it had settled; nothing is touched.
        OSError: the files cannot be moved; they are where they were.
    """
    for path, settled in group.signatures.items():
        if _signature(config.inbox / path) != list(settled):
            raise ChangedError(path)
    roles = {path: role for role in group.files for path in group.files[role]}
    manifest = {
        "folder": group.folder,
        "name": group.name,
        "defaults": group.defaults,
        "files": [
            {"path": path, "role": roles[path], "signature": list(group.signatures[path])}
            for path in group.paths
        ],
    }
    work = config.jobs_dir / _new_id()
    (work / INPUTS).mkdir(parents=True)
    files.write_json(work / MANIFEST, manifest)
    files.sync_folder(config.jobs_dir)
    try:
        _bring_in(work, manifest, config.inbox)
    except OSError:
        _put_back(work, manifest, config.inbox)
        raise
    return _record(work, manifest, config, store)


def adopt_leftovers(config: Config, store: JobStore) -> list[Job]:
    """Finish, at start-up, what a crash interrupted between the inbox and the database, or at a job's end."""
    known = store.states()
    adopted = []
    for work in sorted(path for path in config.jobs_dir.iterdir() if path.is_dir()):
        manifest_file = work / MANIFEST
        if known.get(work.name) in ENDED:
            clear_work_folder(work, State(known[work.name]))
        elif work.name not in known and not manifest_file.exists():
            shutil.rmtree(work)  # the manifest comes first: nothing had been moved
        if work.name in known or not work.exists():
            continue
        try:
            manifest = json.loads(manifest_file.read_text(encoding="utf-8"))
            try:
                _bring_in(work, manifest, config.inbox)
            except ChangedError:
                _put_back(work, manifest, config.inbox)
                continue
        except OSError as error:
            log.error(  # noqa: TRY400 - the text says all
                "job %s: its intake cannot be finished: %s: trying again at the next start", work.name, error
            )
            continue
        adopted.append(_record(work, manifest, config, store))
        log.info("job %s: taken in after a crash during its intake", adopted[-1].id)
    return adopted


def clear_work_folder(work: Path, state: State) -> None:
    """Remove an ended job's folder; a failed one keeps for some days what a retry goes on from."""
    checkpoint = work / CHECKPOINT
    if state is not State.FAILED or not checkpoint.exists() or _days_since(checkpoint) > KEPT_DAYS:
        shutil.rmtree(work)
        return
    for path in work.iterdir():
        if path.is_dir() and path != checkpoint:
            shutil.rmtree(path)
        elif path != checkpoint:
            path.unlink()


def _days_since(path: Path) -> float:
    return (time.time() - path.stat().st_mtime) / 86400


def _new_id() -> str:
    return f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"


def _signature(path: Path) -> list[int] | None:
    """Tell a file from others by that name; None if there is none."""
    try:
        status = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return list(Signature(status.st_size, status.st_mtime_ns, status.st_ino))


def _file_name(entry: dict[str, Any]) -> str:
    return Path(entry["path"]).name


def _claimed(folder: Path, work: Path, entry: dict[str, Any]) -> Path:
    """Give the hidden name that a file has in its folder while it is taken in."""
    return folder / f"{files.PART_PREFIX}{work.name}-{_file_name(entry)}.part"


def _bring_in(work: Path, manifest: dict[str, Any], inbox: Path) -> None:
    """Copy what the manifest names to the work folder and remove it from the inbox; goes on after a crash.

    Raises:
        ChangedError: a file is not any more what had settled; none has been removed.
    """
    inputs = work / INPUTS
    try:
        with files.folder_below(inbox, manifest["folder"]) as folder:
            _claim(folder, work, manifest)
            for entry in manifest["files"]:
                _copy(_claimed(folder, work, entry), inputs / _file_name(entry), entry)
            files.sync_folder(inputs)
            for entry in manifest["files"]:
                _claimed(folder, work, entry).unlink(missing_ok=True)
            files.sync_folder(folder)
    except (FileNotFoundError, NotADirectoryError) as error:
        # The folder is gone; which is as it should be if all was taken before a crash.
        if not all((inputs / _file_name(entry)).exists() for entry in manifest["files"]):
            raise ChangedError(manifest["folder"]) from error


def _claim(folder: Path, work: Path, manifest: dict[str, Any]) -> None:
    for entry in manifest["files"]:
        source, claimed = folder / _file_name(entry), _claimed(folder, work, entry)
        copied = (work / INPUTS / source.name).exists()
        if _signature(claimed) is None and (not copied or _signature(source) == entry["signature"]):
            source.rename(claimed)
        if not copied and _signature(claimed) != entry["signature"]:
            raise ChangedError(entry["path"])


def _copy(claimed: Path, target: Path, entry: dict[str, Any]) -> None:
    if target.exists():
        return  # before a crash
    part = target.with_name(f"{files.PART_PREFIX}{target.name}.part")
    files.copy(claimed, part)
    if _signature(claimed) != entry["signature"]:
        raise ChangedError(entry["path"])  # somebody wrote to it meanwhile
    part.rename(target)


def _put_back(work: Path, manifest: dict[str, Any], inbox: Path) -> None:
    """Undo it: every file gets its name in the inbox again, and the work folder goes."""
    copies = {path.name: path for path in (work / INPUTS).glob("[!.]*")}
    try:
        with files.folder_below(inbox, manifest["folder"]) as folder:
            for entry in manifest["files"]:
                source, claimed = folder / _file_name(entry), _claimed(folder, work, entry)
                if _signature(claimed) is not None:
                    files.rename_to_free_name(claimed, source)
                elif source.name in copies and _signature(source) is None:  # the copy is all there is
                    files.move(copies[source.name], source, part=f"back-{work.name}-{source.name}")
            files.sync_folder(folder)
    except (FileNotFoundError, NotADirectoryError):
        if copies:
            raise
    shutil.rmtree(work)


def _record(work: Path, manifest: dict[str, Any], config: Config, store: JobStore) -> Job:
    """Check what was taken and write the job's row."""
    job = Job(
        id=work.name,
        name=manifest["name"],
        folder=manifest["folder"],
        state=State.QUEUED,
        created_at=utc_now(),
    )
    check(job, work, manifest, config, store)
    log.info("job %s: %s taken in: %s", job.id, job.path, (job.delivery or {}).get("error") or _summary(job))
    return store.add(job)


def check(job: Job, work: Path, manifest: dict[str, Any], config: Config, store: JobStore) -> None:
    """Work out from a job's files what is to be made; if nothing can, its end is decided in ``delivery``."""
    try:
        _check(job, work, manifest, config)
        earlier = store.find_done(job.fingerprint) if config.on_duplicate == "skip" else None
        if earlier is not None:
            job.delivery = {
                "state": State.SKIPPED,
                "error": f"the same as job {earlier.id}: {earlier.output}",
            }
    except RequestError as error:
        job.delivery = {"state": State.FAILED, "error": printable(str(error))}
    except OSError as error:
        reason = (
            f"{Path(error.filename or work).name} cannot be read ({error.strerror}): correct its permissions"
        )
        job.delivery = {"state": State.FAILED, "error": printable(f"{reason} and drop the files again")}
    except StoreError:
        raise
    except Exception as error:
        # Whatever a file can do to us, it must not stop the queue, now or at the next start.
        log.exception("job %s: %s cannot be taken in", job.id, job.path)
        reason = f"an error of framepackd's own ({type(error).__name__}: {error}): please report it"
        job.delivery = {"state": State.FAILED, "error": printable(reason)}


def _summary(job: Job) -> str:
    return f"{job.frames} frames ({job.frames / 30:.2f} s), {job.width}x{job.height}"


def _check(job: Job, work: Path, manifest: dict[str, Any], config: Config) -> None:
    job.inputs = {entry["role"]: {"file": _file_name(entry), "sha256": None} for entry in manifest["files"]}
    for entry in job.inputs.values():
        entry["sha256"] = files.sha256(work / INPUTS / entry["file"])
    if "diff" in job.inputs:
        job.inputs["diff"]["values"] = read_differences(work / INPUTS / job.inputs["diff"]["file"])
    settings = _settings(work, manifest, job, config).with_drawn_seed()
    name = config.model if settings.model is None else settings.model
    if name not in config.model_names():
        raise RequestError(f"model must be one of {', '.join(config.model_names())}, got {name!r}")
    spec = config.spec(name)
    spec.verify(end_image="end" in job.inputs)
    sizes = {
        role: picture_size(work / INPUTS / job.inputs[role]["file"])
        for role in ("image", "end")
        if role in job.inputs
    }
    job.height, job.width = output_size(settings, sizes["image"], spec.buckets)
    for size in sizes.values():
        covering_size(size, (job.height, job.width))
    job.sections = section_count(settings.seconds, settings.latent_window_size)
    job.frames = frame_count(job.sections, settings.latent_window_size)
    job.steps_total = job.sections * settings.steps
    job.settings = settings.model_dump() | {
        "model": name,
        "width": job.width,
        "height": job.height,
        "loras": loras.take_in(settings.loras, config.lora_dir, spec),
    }
    job.fingerprint = _fingerprint(job)


def _settings(work: Path, manifest: dict[str, Any], job: Job, config: Config) -> JobSettings:
    """Lay the settings over each other: config, defaults of the folders, the job's own, and its text."""
    layers = [config.defaults]
    for path in manifest["defaults"]:
        with contextlib.suppress(FileNotFoundError):  # taken away since
            folder, _, name = path.rpartition("/")
            with files.folder_below(config.inbox, folder) as opened:
                layers.append(read_settings_file(opened / name, path))
    own: dict[str, Any] = {}
    if "settings" in job.inputs:
        file = job.inputs["settings"]["file"]
        own = read_settings_file(work / INPUTS / file, file)
    layers.append(own)
    if "text" in job.inputs:
        prompt = _read_prompt(work / INPUTS / job.inputs["text"]["file"])
        if not prompt and "prompt" not in own:
            raise RequestError(
                f"{job.inputs['text']['file']} is empty: write what is to happen, or, for no prompt at all, "
                f'put prompt = "" into {job.name}.toml'
            )
        if prompt:
            layers.append({"prompt": prompt})
    merged: dict[str, Any] = {}
    for layer in layers:
        if "resolution" in layer:  # the nearer wish counts, whichever way the size is said
            merged = {key: value for key, value in merged.items() if key not in ("width", "height")}
        merged |= layer
    settings = JobSettings.model_validate(parse_settings(merged, f"the settings of {job.name} together"))
    if settings.prompt is None:
        raise RequestError(f"{job.name} has no prompt: add {job.name}.txt")
    return settings


def _read_prompt(path: Path) -> str:
    if path.stat().st_size > MAX_TEXT_BYTES:
        raise RequestError(f"{path.name} has {path.stat().st_size} bytes: a prompt may have {MAX_TEXT_BYTES}")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RequestError(
            f"{path.name} is not UTF-8 (byte {error.start} is {error.object[error.start]:#04x}): "
            "save it as UTF-8 and drop the files again"
        ) from error
    if "\0" in text:
        raise RequestError(
            f"{path.name} holds null characters, so it is no text, or one in UTF-16: "
            "save it as UTF-8 and drop the files again"
        )
    return text.replace("\r\n", "\n").strip()


def _fingerprint(job: Job) -> str:
    """Hash what decides the result: pictures, prompt, settings and the content of LoRAs."""
    pictures = {role: job.inputs[role]["sha256"] for role in ("image", "end") if role in job.inputs}
    decisive = json.dumps([pictures, loras.decisive(job.settings)], sort_keys=True)
    return hashlib.sha256(decisive.encode()).hexdigest()
