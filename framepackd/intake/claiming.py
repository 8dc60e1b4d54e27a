"""Moves files from the inbox to a work folder and back; after any crash each is in one of the two.

They get hidden names in their folder, and are nobody else's any more; they are copied, because others may
hold a link to one or have it open; the hidden ones are removed.
"""

import contextlib
import errno
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from framepackd import files, moving
from framepackd.inbox.listing import Signature
from framepackd.jobs.folder import INPUTS
from framepackd.text import taken_name


class ChangedError(OSError):
    """A file is not any more what had settled."""


class HalfTakenError(OSError):
    """Files that were being taken in are neither in the inbox nor in the work folder; the text says more."""


def signature_of(path: Path) -> list[int] | None:
    """Tell a file from others by that name; None if there is none."""
    try:
        status = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return list(Signature(status.st_size, status.st_mtime_ns, status.st_ino))


def _dropped_name(entry: dict[str, Any]) -> str:
    return Path(entry["path"]).name


def _claimed(folder: Path, work: Path, entry: dict[str, Any]) -> Path:
    """Give the hidden name that a file has in its folder while it is taken in."""
    return folder / f"{files.PART_PREFIX}{work.name}-{_dropped_name(entry)}.part"


def _back(folder: Path, work: Path, entry: dict[str, Any]) -> Path:
    """Give the hidden name that a copy has in the inbox while it is moved back."""
    return folder / f"{files.PART_PREFIX}{_back_part(work, entry)}.part"


def _back_part(work: Path, entry: dict[str, Any]) -> str:
    return f"back-{work.name}-{_dropped_name(entry)}"


def _copy_of(work: Path, entry: dict[str, Any]) -> Path:
    return work / INPUTS / taken_name(entry)


def bring_in(work: Path, manifest: dict[str, Any], inbox: Path) -> None:
    """Copy what the manifest names to the work folder and remove it from the inbox; goes on after a crash.

    Raises:
        ChangedError: a file is not any more what had settled; none has been removed.
    """
    try:
        with files.folder_below(inbox, manifest["folder"]) as folder:
            _claim(folder, work, manifest)
            for entry in manifest["files"]:
                _copy(_claimed(folder, work, entry), _copy_of(work, entry), entry)
            files.sync_folder(work / INPUTS)
            for entry in manifest["files"]:
                _claimed(folder, work, entry).unlink(missing_ok=True)
                _back(folder, work, entry).unlink(missing_ok=True)  # it was on its way back when a crash came
            files.sync_folder(folder)
    except (FileNotFoundError, NotADirectoryError) as error:
        # The folder is gone; which is as it should be if all was taken before a crash.
        if not all(_copy_of(work, entry).exists() for entry in manifest["files"]):
            raise ChangedError(manifest["folder"]) from error


def _claim(folder: Path, work: Path, manifest: dict[str, Any]) -> None:
    for entry in manifest["files"]:  # all are looked at before one is renamed
        there = signature_of(_claimed(folder, work, entry)) or signature_of(folder / _dropped_name(entry))
        if not _copy_of(work, entry).exists() and there != entry["signature"]:
            raise ChangedError(entry["path"])
    for entry in manifest["files"]:
        source, claimed = folder / _dropped_name(entry), _claimed(folder, work, entry)
        copied = _copy_of(work, entry).exists()
        if signature_of(claimed) is None and (not copied or signature_of(source) == entry["signature"]):
            source.rename(claimed)
        if not copied and signature_of(claimed) != entry["signature"]:
            raise ChangedError(entry["path"])


def _copy(claimed: Path, target: Path, entry: dict[str, Any]) -> None:
    if target.exists():
        return  # before a crash
    part = target.with_name(f"{files.PART_PREFIX}{target.name}.part")
    files.copy(claimed, part)
    if signature_of(claimed) != entry["signature"]:
        raise ChangedError(entry["path"])  # somebody wrote to it meanwhile
    part.rename(target)


def put_back(work: Path, manifest: dict[str, Any], inbox: Path) -> None:
    """Undo it: every file gets its name in the inbox again, and the work folder goes.

    Raises:
        HalfTakenError: some of the files are elsewhere, as it seems; nothing has changed.
        OSError: a file cannot be moved; called again, it goes on.
    """
    with ExitStack() as stack:
        try:
            folder = stack.enter_context(files.folder_below(inbox, manifest["folder"]))
        except (FileNotFoundError, NotADirectoryError):
            folder = None
        elsewhere = _not_in(folder, work, manifest)
        copied = any(_copy_of(work, entry).exists() for entry in manifest["files"])
        # In the inbox that they were taken from what is missing was removed by somebody.
        if elsewhere and ((copied and folder is None) or not _is_same(inbox, manifest)):
            raise HalfTakenError(errno.ENOENT, _told_of_half(work, inbox / manifest["folder"], elsewhere))
        if folder is not None:
            for entry in manifest["files"]:
                _put_one_back(folder, work, entry)
            files.sync_folder(folder)
    files.discard_folder(work)


def _put_one_back(folder: Path, work: Path, entry: dict[str, Any]) -> None:
    source, claimed, copy = (
        folder / _dropped_name(entry),
        _claimed(folder, work, entry),
        _copy_of(work, entry),
    )
    if signature_of(claimed) is not None:
        files.rename_to_free_name(claimed, source)
    elif signature_of(source) != entry["signature"] and (
        copy.exists() or _back(folder, work, entry).exists()
    ):
        # The copy is all there is: another file may have come under its name.
        for target in files.free_names(source):
            with contextlib.suppress(FileExistsError):
                moving.move(copy, target, part=_back_part(work, entry))
                break


def _not_in(folder: Path | None, work: Path, manifest: dict[str, Any]) -> list[str]:
    """Name the files of which nothing lies in the folder: neither hidden nor under their own names."""
    if folder is None:
        return [_dropped_name(entry) for entry in manifest["files"]]
    return [
        _dropped_name(entry)
        for entry in manifest["files"]
        if signature_of(_claimed(folder, work, entry)) is None
        and signature_of(folder / _dropped_name(entry)) is None
    ]


def _is_same(inbox: Path, manifest: dict[str, Any]) -> bool:
    """Say whether this is the inbox that the files were taken from, and not what its share is mounted on."""
    try:
        return bool(inbox.stat().st_ino == manifest.get("inbox"))
    except OSError:
        return False


def _told_of_half(work: Path, folder: Path, elsewhere: list[str]) -> str:
    named = ", ".join(elsewhere[:3]) + (f" and {len(elsewhere) - 3} more" if len(elsewhere) > 3 else "")
    return (
        f"is half taken in: {named} {'is' if len(elsewhere) == 1 else 'are'} not in {folder}: is its share "
        "mounted? It goes on by itself when the files are there; if they are gone for good, drop what is in "
        f"{work / INPUTS} again and move the folder away"
    )
