"""Makes inbox files of videos and data sets, for framepackd prepare.

Each item is prepared in a hidden folder of the target. Then its files are moved into the target, the picture
that a job starts from last, so that no job is taken in half. After an interruption the next run resumes.
"""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import stat
import tempfile
import tomllib
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from framepack_core.errors import RequestError
from framepack_core.media import pictures as media
from framepackd import files
from framepackd.files import moving
from framepackd.inbox.listing import IGNORED, IGNORED_FOLDERS
from framepackd.jobs.job import State
from framepackd.jobs.store import JobStore
from framepackd.prepare import video_frames
from framepackd.prepare.items import (
    Item,
    ItemOutcome,
    ItemResult,
    ItemStream,
    Options,
    UsageError,
    choose_names,
    endings_of,
)
from framepackd.settings.config import Config
from framepackd.settings.decoding import read_prompt
from framepackd.settings.job_settings import parse_settings
from framepackd.text import as_utf8

if TYPE_CHECKING:
    from framepackd.prepare.datasets import Writer

STAGING = ".framepackd-prepare"
OTHER_ROLES = ("text", "settings", "diff")  # of files that are not pictures
DONE = (State.DONE, State.SKIPPED, State.QUEUED, State.RUNNING)


def read_settings(pairs: Iterable[str]) -> str:
    r"""Turn KEY=VALUE pairs into the text of a ``NAME.toml``, and check it; a value that is not TOML is text.

    >>> read_settings(["seconds=3", "cache=teacache"])
    'seconds = 3\ncache = "teacache"\n'

    Raises:
        UsageError: a pair has another form, or is not a setting of a job.
    """
    lines = []
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise UsageError(f"--set needs KEY=VALUE, got {pair!r}: for example seconds=3")
        line = f"{key.strip()} = {value.strip()}\n"
        try:
            tomllib.loads(line)
        except tomllib.TOMLDecodeError:
            line = f"{key.strip()} = {json.dumps(value.strip())}\n"
        lines.append(line)
    try:
        read = parse_settings(tomllib.loads("".join(lines)), "--set")
    except (tomllib.TOMLDecodeError, RequestError) as error:
        raise UsageError(str(error)) from error
    if "prompt" in read:
        raise UsageError("--set prompt: the text of a job counts before its settings: use --prompt")
    return "".join(lines)


def find(options: Options) -> ItemStream:
    """Find the items to prepare.

    Raises:
        UsageError: there are none, or the options do not fit them.
    """
    source = options.source
    if options.prompt is not None and not options.prompt.strip():
        raise UsageError("--prompt is empty: write what happens, or leave it out and write captions")
    if not source.exists():
        raise UsageError(
            f"{source} does not exist: give a folder of videos, a video, or a data set (one of the hub "
            "comes by: hf download --repo-type dataset ORG/NAME --local-dir FOLDER)"
        )
    videos = [source] if source.is_file() else sorted(_list_videos(source))
    videos = [path for path in videos if path.suffix.lower() in video_frames.SUFFIXES]
    if videos:
        return _videos(videos, options)
    from framepackd.prepare import datasets

    if datasets.is_one(source):
        if options.frames is not None:
            raise UsageError("--frames is for videos: how many pictures a data set has is in its columns")
        return datasets.read(options)
    raise UsageError(
        f"{source} holds no videos ({', '.join(video_frames.SUFFIXES)}) and no data set "
        "(saved by save_to_disk, or .parquet): give another folder"
    )


def _list_videos(folder: Path) -> Iterator[Path]:
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not IGNORED_FOLDERS.search(name)]
        yield from (Path(root, name) for name in names if not IGNORED.search(name))


def _videos(videos: list[Path], options: Options) -> ItemStream:
    if options.split is not None:
        raise UsageError("--split is for data sets: videos have none")
    root = options.source if options.source.is_dir() else options.source.parent
    count = options.frames or 2
    endings = endings_of(count, chain=options.frames is not None)
    names = choose_names([PurePosixPath(path.relative_to(root)) for path in videos])
    items = [
        Item(
            origin=as_utf8(f"{path}"),
            folder=as_utf8(f"{path.parent}") if path.parent.name else "",
            name=name,
            endings=endings,
            pictures=partial(video_frames.read_frames, root / path, count),
            text=partial(_text, root / path, options.prompt),
        )
        for path, name in names.items()
    ]
    return ItemStream(len(items), endings, items)


def _text(video: Path, prompt: str | None) -> str:
    """Give the prompt for all videos, or the caption of this one."""
    if prompt is not None:
        return prompt
    captions = [video.with_suffix(suffix) for suffix in (".txt", ".TXT", ".Txt")]
    caption = next((path for path in captions if path.is_file()), captions[0])
    try:
        text = read_prompt(caption)
    except FileNotFoundError as error:
        raise RequestError(
            f"has no caption {caption.name}: write it, or give one --prompt for all"
        ) from error
    except OSError as error:
        raise RequestError(f"{caption.name} cannot be read ({error.strerror}): correct its rights") from error
    if not text:
        raise RequestError(f"{caption.name} is empty: write what happens, or give one --prompt for all")
    return text


def prepare(
    source: ItemStream, options: Options, config: Config, writer: "Writer | None" = None
) -> Iterator[ItemResult]:
    """Prepare one item after the other; a bad one is reported and left out. ``writer`` gets the good ones.

    Raises:
        UsageError: another run works on the same target.
        OSError, StoreError: the target or the database cannot be used; run it again when they can.
    """
    store = None
    if options.skip_done and config.database.exists():
        store = JobStore(config.database, read_only=True)
    with _staging(options) as staging:
        for item in source.items:
            try:
                yield _prepare(item, options, staging, store, writer)
            except RequestError as error:
                yield ItemResult(item, ItemOutcome.BAD, str(error))
            finally:
                for path in staging.iterdir():
                    path.unlink()


@contextlib.contextmanager
def _staging(options: Options) -> Iterator[Path]:
    """Make a hidden folder in the target that no other run uses, and remove it afterwards."""
    if options.dry_run:
        with tempfile.TemporaryDirectory(prefix="framepackd-") as folder:
            yield Path(folder)
        return
    files.make_folder(options.target)
    lock = os.open(options.target, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(
                f"another framepackd prepare is at work on {options.target}: wait for it, or end it"
            ) from error
        except OSError as error:
            if error.errno not in (errno.EBADF, errno.ENOLCK, errno.ENOSYS):  # some network file systems
                raise
        staging = options.target / STAGING
        if staging.exists():
            shutil.rmtree(staging)  # left by a run that was killed
        staging.mkdir()
        try:
            yield staging
        finally:
            shutil.rmtree(staging)
    finally:
        os.close(lock)


def _prepare(
    item: Item,
    options: Options,
    staging: Path,
    store: JobStore | None,
    writer: "Writer | None",
) -> ItemResult:
    folder = options.target / item.folder
    text = item.text()
    if writer is None and not options.dry_run and _is_there(item, folder, text):
        return ItemResult(item, ItemOutcome.THERE)
    differences = _stage(item, staging)
    if options.max_difference is not None and any(each >= options.max_difference for each in differences):
        return ItemResult(item, ItemOutcome.DIFFERENT, differences=differences)
    pictures = [staging / (item.name + ending) for ending in item.endings]
    if writer is not None:
        writer.add(pictures, text, differences)
    if store is not None and _is_done(pictures, text, store):
        return ItemResult(item, ItemOutcome.DONE, differences=differences)
    if options.dry_run:
        return ItemResult(item, ItemOutcome.PREPARED, differences=differences)
    beside = {".txt": f"{text}\n"}
    if differences:
        beside["_frame_diff.txt"] = "".join(f"{each}\n" for each in differences)
    if options.settings:
        beside[".toml"] = options.settings
    for ending, content in beside.items():
        (staging / (item.name + ending)).write_text(content, encoding="utf-8")
    # The first picture last: without it the files are not a job.
    ordered = [*(staging / (item.name + ending) for ending in beside), *reversed(pictures)]
    outcome = ItemOutcome.PREPARED if _place(ordered, folder) else ItemOutcome.THERE
    return ItemResult(item, outcome, differences=differences)


def _is_there(item: Item, folder: Path, text: str) -> bool:
    """Say whether an earlier run has finished this item, and its files are still there."""
    if not all((folder / (item.name + ending)).is_file() for ending in (*item.endings, ".txt")):
        return False
    try:
        there = (folder / f"{item.name}.txt").read_bytes()
    except FileNotFoundError:  # taken just now
        return True
    if there.decode(errors="replace").strip() != text.strip():
        raise _occupied(folder / f"{item.name}.txt")
    return True


def _stage(item: Item, staging: Path) -> tuple[float, ...]:
    """Write the pictures, and give how much neighbours differ; two are in memory at a time."""
    differences: list[float] = []
    last = None
    for ending, picture in zip(item.endings, item.pictures(), strict=True):
        if last is not None and item.differences is None:
            differences.append(video_frames.difference(last, picture))
        media.write_picture(staging / (item.name + ending), picture)
        last = picture
    return tuple(differences) if item.differences is None else item.differences


def _is_done(pictures: list[Path], text: str, store: JobStore) -> bool:
    """Say whether a job with exactly these pictures and this prompt is done, queued or running."""
    wanted = sorted(files.sha256(path) for path in pictures)
    for job in store.made_of(wanted[0]):
        its = (str(entry["sha256"]) for role, entry in job.inputs.items() if role not in OTHER_ROLES)
        if sorted(its) == wanted and job.state in DONE and job.settings.get("prompt") == text.strip():
            return True
    return False


def _place(staged: list[Path], folder: Path) -> bool:
    """Move files into a folder, in this order, replacing none; says whether any was missing there.

    Raises:
        RequestError: another file has one of the names.
    """
    for path in staged:
        there = folder / path.name
        with contextlib.suppress(FileNotFoundError):  # the name is free
            if not stat.S_ISREG(there.lstat().st_mode) or files.sha256(there) != files.sha256(path):
                raise _occupied(there)
    files.make_folder(folder)
    placed = False
    for path in staged:
        files.sync_file(path)
        with contextlib.suppress(FileExistsError):
            moving.move(path, folder / path.name, part=f"prepare-{path.name}")
            placed = True
    return placed


def _occupied(path: Path) -> RequestError:
    return RequestError(
        f"{path} is there already with something else in it: move it away, or give another TARGET"
    )
