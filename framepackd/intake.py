"""From settled files in the inbox to a job: take the files, check them, record the job.

Order matters: a manifest says what is to be taken, then the files are moved, then the row is written. What
a crash leaves in between is finished at the next start.
"""

import contextlib
import hashlib
import json
import logging
import secrets
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from framepack_core.buckets import output_size
from framepack_core.errors import RequestError
from framepack_core.sections import frame_count, section_count
from framepackd import files
from framepackd.config import Config
from framepackd.database import ENDED, Job, State, utc_now
from framepackd.inbox import Group, Signature
from framepackd.jobs import JobStore
from framepackd.settings import JobSettings, parse_settings, read_settings_file

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
INPUTS = "inputs"
MAX_TEXT_BYTES = 1 << 20


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
            {"path": path, "role": roles[path], "signature": _signature(config.inbox / path)}
            for path in group.paths
        ],
    }
    work = config.jobs_dir / _new_id()
    (work / INPUTS).mkdir(parents=True)
    files.write_json(work / MANIFEST, manifest)
    files.sync_folder(config.jobs_dir)
    try:
        _move_inputs(work, manifest, config.inbox)
    except OSError:
        _put_back(work, manifest, config.inbox)
        shutil.rmtree(work)
        raise
    return _record(work, manifest, config, store)


def adopt_leftovers(config: Config, store: JobStore) -> list[Job]:
    """Finish, at start-up, what a crash interrupted between the inbox and the database, or at a job's end."""
    known = store.states()
    adopted = []
    for work in sorted(path for path in config.jobs_dir.iterdir() if path.is_dir()):
        manifest_file = work / MANIFEST
        # The manifest comes first: without it nothing had been moved. And an ended job needs no folder.
        if known.get(work.name) in ENDED or (work.name not in known and not manifest_file.exists()):
            shutil.rmtree(work)
        if work.name in known or not work.exists():
            continue
        try:
            manifest = json.loads(manifest_file.read_text(encoding="utf-8"))
            _move_inputs(work, manifest, config.inbox)
        except OSError as error:
            log.error(  # noqa: TRY400 - the text says all
                "job %s: its intake cannot be finished: %s: trying again at the next start", work.name, error
            )
            continue
        adopted.append(_record(work, manifest, config, store))
        log.info("job %s: taken in after a crash during its intake", adopted[-1].id)
    return adopted


def _new_id() -> str:
    return f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"


def _signature(path: Path) -> list[int]:
    status = path.lstat()
    return list(Signature(status.st_size, status.st_mtime_ns, status.st_ino))


def _file_name(entry: dict[str, Any]) -> str:
    return Path(entry["path"]).name


def _move_inputs(work: Path, manifest: dict[str, Any], inbox: Path) -> None:
    """Move what the manifest names; what was moved before a crash is left alone."""
    for entry in manifest["files"]:
        source, target = inbox / entry["path"], work / INPUTS / _file_name(entry)
        if target.exists() or (source.exists() and _signature(source) != entry["signature"]):
            continue  # done before, or another file of the same name that came since
        files.move(source, target, part=f"in-{_file_name(entry)}")


def _put_back(work: Path, manifest: dict[str, Any], inbox: Path) -> None:
    for entry in manifest["files"]:
        target = work / INPUTS / _file_name(entry)
        if target.exists():
            files.move(target, inbox / entry["path"], part=f"back-{work.name}-{_file_name(entry)}")


def _record(work: Path, manifest: dict[str, Any], config: Config, store: JobStore) -> Job:
    """Check what was taken and write the job's row; a job that cannot be made is decided at once."""
    job = Job(
        id=work.name,
        name=manifest["name"],
        folder=manifest["folder"],
        state=State.QUEUED,
        created_at=utc_now(),
    )
    try:
        _check(job, work, manifest, config)
        earlier = store.find_done(job.fingerprint) if config.on_duplicate == "skip" else None
        if earlier is not None:
            job.delivery = {
                "state": State.SKIPPED,
                "error": f"the same as job {earlier.id}: {earlier.output}",
            }
    except RequestError as error:
        job.delivery = {"state": State.FAILED, "error": str(error)}
    except OSError as error:
        reason = (
            f"{Path(error.filename or work).name} cannot be read ({error.strerror}): correct its permissions"
        )
        job.delivery = {"state": State.FAILED, "error": f"{reason} and drop the files again"}
    except Exception as error:
        # Whatever a file can do to us, it must not stop the queue, now or at the next start.
        log.exception("job %s: %s cannot be taken in", job.id, job.path)
        reason = f"an error of framepackd's own ({type(error).__name__}: {error}): please report it"
        job.delivery = {"state": State.FAILED, "error": reason}
    log.info("job %s: %s taken in: %s", job.id, job.path, (job.delivery or {}).get("error") or _summary(job))
    return store.add(job)


def _summary(job: Job) -> str:
    return f"{job.frames} frames ({job.frames / 30:.2f} s), {job.width}x{job.height}"


def _check(job: Job, work: Path, manifest: dict[str, Any], config: Config) -> None:
    from framepack_core.media import open_picture  # loads NumPy, which other commands do without

    for entry in manifest["files"]:
        path = work / INPUTS / _file_name(entry)
        if not path.exists():
            raise RequestError(f"{_file_name(entry)} disappeared while it was taken in: drop the files again")
        job.inputs = (job.inputs or {}) | {entry["role"]: {"file": path.name, "sha256": files.sha256(path)}}
    settings = _settings(work, manifest, job, config).with_drawn_seed()
    name = settings.model or config.model
    if name not in config.model_names():
        raise RequestError(f"model must be one of {', '.join(config.model_names())}, got {name!r}")
    spec = config.spec(name)
    spec.verify(end_image="end" in job.inputs)
    pictures = {
        role: open_picture(work / INPUTS / job.inputs[role]["file"])
        for role in ("image", "end")
        if role in job.inputs
    }
    job.height, job.width = output_size(settings, pictures["image"].shape[:2], spec.buckets)
    job.sections = section_count(settings.seconds, settings.latent_window_size)
    job.frames = frame_count(job.sections, settings.latent_window_size)
    job.steps_total = job.sections * settings.steps
    job.settings = settings.model_dump() | {"model": name, "width": job.width, "height": job.height}
    job.fingerprint = _fingerprint(job)


def _settings(work: Path, manifest: dict[str, Any], job: Job, config: Config) -> JobSettings:
    """Lay the settings over each other: config, defaults of the folders, the job's own, and its text."""
    layers = [config.defaults]
    for path in manifest["defaults"]:
        with contextlib.suppress(FileNotFoundError):  # taken away since
            layers.append(read_settings_file(config.inbox / path, path))
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
    return text.replace("\r\n", "\n").strip()


def _fingerprint(job: Job) -> str:
    """Hash what decides the result: pictures, prompt and settings."""
    pictures = {role: job.inputs[role]["sha256"] for role in ("image", "end") if role in job.inputs}
    decisive = json.dumps([pictures, job.settings], sort_keys=True)
    return hashlib.sha256(decisive.encode()).hexdigest()
