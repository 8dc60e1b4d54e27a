"""Moves files from the inbox to a work folder and back; after any crash each is in one of the two.

They get hidden names in their folder, and are nobody else's any more; they are copied, because others may
hold a link to one or have it open; the hidden ones are removed.
"""

import contextlib
import errno
from contextlib import ExitStack
from pathlib import Path

from framepackd import files, moving
from framepackd.inbox.listing import Signature
from framepackd.jobs.folder import INPUTS, DroppedFile, Manifest


class ChangedError(OSError):
    """A file is not any more what had settled."""


class HalfTakenError(OSError):
    """Files that were being taken in are neither in the inbox nor in the work folder; the text says more."""


def signature_of(path: Path) -> Signature | None:
    """Tell a file from others by that name; None if there is none."""
    try:
        status = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return Signature(status.st_size, status.st_mtime_ns, status.st_ino)


def _claimed(folder: Path, work: Path, file: DroppedFile) -> Path:
    """Give the hidden name that a file has in its folder while it is taken in."""
    return folder / f"{files.PART_PREFIX}{work.name}-{file.dropped_name}.part"


def _back(folder: Path, work: Path, file: DroppedFile) -> Path:
    """Give the hidden name that a copy has in the inbox while it is moved back."""
    return folder / f"{files.PART_PREFIX}{_back_part(work, file)}.part"


def _back_part(work: Path, file: DroppedFile) -> str:
    return f"back-{work.name}-{file.dropped_name}"


def _copy_of(work: Path, file: DroppedFile) -> Path:
    return work / INPUTS / file.taken_name


def bring_in(work: Path, manifest: Manifest, inbox: Path) -> None:
    """Copy what the manifest names to the work folder and remove it from the inbox; goes on after a crash.

    Raises:
        ChangedError: a file is not any more what had settled; none has been removed.
    """
    try:
        with files.folder_below(inbox, manifest.folder) as folder:
            _claim(folder, work, manifest)
            for file in manifest.files:
                _copy(_claimed(folder, work, file), _copy_of(work, file), file)
            files.sync_folder(work / INPUTS)
            for file in manifest.files:
                _claimed(folder, work, file).unlink(missing_ok=True)
                _back(folder, work, file).unlink(missing_ok=True)  # it was on its way back when a crash came
            files.sync_folder(folder)
    except (FileNotFoundError, NotADirectoryError) as error:
        # The folder is gone; which is as it should be if all was taken before a crash.
        if not all(_copy_of(work, file).exists() for file in manifest.files):
            raise ChangedError(manifest.folder) from error


def _claim(folder: Path, work: Path, manifest: Manifest) -> None:
    for file in manifest.files:  # all are looked at before one is renamed
        there = signature_of(_claimed(folder, work, file)) or signature_of(folder / file.dropped_name)
        if not _copy_of(work, file).exists() and there != file.signature:
            raise ChangedError(file.path)
    for file in manifest.files:
        source, claimed = folder / file.dropped_name, _claimed(folder, work, file)
        copied = _copy_of(work, file).exists()
        if signature_of(claimed) is None and (not copied or signature_of(source) == file.signature):
            source.rename(claimed)
        if not copied and signature_of(claimed) != file.signature:
            raise ChangedError(file.path)


def _copy(claimed: Path, target: Path, file: DroppedFile) -> None:
    if target.exists():
        return  # before a crash
    part = target.with_name(f"{files.PART_PREFIX}{target.name}.part")
    files.copy(claimed, part)
    if signature_of(claimed) != file.signature:
        raise ChangedError(file.path)  # somebody wrote to it meanwhile
    part.rename(target)


def put_back(work: Path, manifest: Manifest, inbox: Path) -> None:
    """Undo it: every file gets its name in the inbox again, and the work folder goes.

    Raises:
        HalfTakenError: some of the files are elsewhere, as it seems; nothing has changed.
        OSError: a file cannot be moved; called again, it goes on.
    """
    with ExitStack() as stack:
        try:
            folder = stack.enter_context(files.folder_below(inbox, manifest.folder))
        except (FileNotFoundError, NotADirectoryError):
            folder = None
        elsewhere = _not_in(folder, work, manifest)
        copied = any(_copy_of(work, file).exists() for file in manifest.files)
        # In the inbox that they were taken from what is missing was removed by somebody.
        if elsewhere and ((copied and folder is None) or not _is_same(inbox, manifest)):
            raise HalfTakenError(errno.ENOENT, _told_of_half(work, inbox / manifest.folder, elsewhere))
        if folder is not None:
            for file in manifest.files:
                _put_one_back(folder, work, file)
            files.sync_folder(folder)
    files.discard_folder(work)


def _put_one_back(folder: Path, work: Path, file: DroppedFile) -> None:
    source, claimed, copy = folder / file.dropped_name, _claimed(folder, work, file), _copy_of(work, file)
    if signature_of(claimed) is not None:
        files.rename_to_free_name(claimed, source)
    elif signature_of(source) != file.signature and (copy.exists() or _back(folder, work, file).exists()):
        # The copy is all there is: another file may have come under its name.
        for target in files.free_names(source):
            with contextlib.suppress(FileExistsError):
                moving.move(copy, target, part=_back_part(work, file))
                break


def _not_in(folder: Path | None, work: Path, manifest: Manifest) -> list[str]:
    """Name the files of which nothing lies in the folder: neither hidden nor under their own names."""
    if folder is None:
        return [file.dropped_name for file in manifest.files]
    return [
        file.dropped_name
        for file in manifest.files
        if signature_of(_claimed(folder, work, file)) is None
        and signature_of(folder / file.dropped_name) is None
    ]


def _is_same(inbox: Path, manifest: Manifest) -> bool:
    """Say whether this is the inbox that the files were taken from, and not what its share is mounted on."""
    try:
        return bool(inbox.stat().st_ino == manifest.inbox)
    except OSError:
        return False


def _told_of_half(work: Path, folder: Path, elsewhere: list[str]) -> str:
    named = ", ".join(elsewhere[:3]) + (f" and {len(elsewhere) - 3} more" if len(elsewhere) > 3 else "")
    return (
        f"is half taken in: {named} {'is' if len(elsewhere) == 1 else 'are'} not in {folder}: is its share "
        "mounted? It goes on by itself when the files are there; if they are gone for good, drop what is in "
        f"{work / INPUTS} again and move the folder away"
    )
