"""Moves files from the inbox to a work folder and back; after any crash each is in one of the two.

The files get hidden names in their folder, so that nobody else uses them. They are copied, because another
program may hold a link to one or have it open. Then the hidden ones are removed.
"""

import contextlib
import errno
from contextlib import ExitStack
from pathlib import Path

from framepackd import files
from framepackd.files import moving
from framepackd.inbox.listing import Signature
from framepackd.jobs.folder import INPUTS, DroppedFile, Manifest


class ChangedError(OSError):
    """A file has changed since it had settled."""


class HalfTakenError(OSError):
    """Files that were being taken in can be neither taken nor put back for now; the text says why."""


def signature_of(path: Path) -> Signature | None:
    """Read the signature of a file; None if there is none."""
    try:
        status = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return Signature(status.st_size, status.st_mtime_ns, status.st_ino)


def _claimed(folder: Path, work: Path, file: DroppedFile) -> Path:
    """Give the hidden name that a file has in its folder while it is taken in."""
    return folder / f"{files.PART_PREFIX}{work.name}-{file.dropped_name}.part"


def _back_part(work: Path, file: DroppedFile) -> str:
    """Give the ``part`` for moving.move, which makes of it the hidden name of a copy that moves back."""
    return f"back-{work.name}-{file.dropped_name}"


def _back(folder: Path, work: Path, file: DroppedFile) -> Path:
    return moving.part_beside(folder / file.dropped_name, _back_part(work, file))


def _copy_of(work: Path, file: DroppedFile) -> Path:
    return work / INPUTS / file.taken_name


def bring_in(work: Path, manifest: Manifest, inbox: Path) -> None:
    """Copy the files of a manifest to the work folder and remove them from the inbox; resumes after a crash.

    Raises:
        ChangedError: a file has changed since it had settled; none has been removed.
    """
    try:
        with files.folder_below(inbox, manifest.folder) as folder:
            _claim(folder, work, manifest)
            for file in manifest.files:
                _copy(_claimed(folder, work, file), _copy_of(work, file), file)
            files.sync_folder(work / INPUTS)
            for file in manifest.files:
                _claimed(folder, work, file).unlink(missing_ok=True)
                _back(folder, work, file).unlink(missing_ok=True)  # a crash interrupted put_back
            files.sync_folder(folder)
    except (FileNotFoundError, NotADirectoryError) as error:
        # The folder is gone. That is fine if all its files were taken before a crash.
        if not all(_copy_of(work, file).exists() for file in manifest.files):
            raise ChangedError(manifest.folder) from error


def _claim(folder: Path, work: Path, manifest: Manifest) -> None:
    for file in manifest.files:  # check all before renaming one
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
        return  # it was copied before a crash
    part = files.hidden_part(target)
    files.copy(claimed, part)
    if signature_of(claimed) != file.signature:
        raise ChangedError(file.path)  # another program wrote to it meanwhile
    part.rename(target)


def put_back(work: Path, manifest: Manifest, inbox: Path) -> None:
    """Undo ``bring_in``: give every file its name in the inbox again, and remove the work folder.

    Raises:
        HalfTakenError: some of the files are not there, as if a share was unmounted; nothing has changed.
        OSError: a file cannot be moved; another call resumes.
    """
    with ExitStack() as stack:
        try:
            folder = stack.enter_context(files.folder_below(inbox, manifest.folder))
        except (FileNotFoundError, NotADirectoryError):
            folder = None
        elsewhere = _not_in(folder, work, manifest)
        copied = any(_copy_of(work, file).exists() for file in manifest.files)
        # If this is the inbox that they were taken from, somebody has removed the missing ones.
        if elsewhere and ((copied and folder is None) or not _is_same(inbox, manifest)):
            raise HalfTakenError(errno.ENOENT, _half_taken(work, inbox / manifest.folder, elsewhere))
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
        # Only the copy is left; another file may have come under its name.
        for target in files.free_names(source):
            with contextlib.suppress(FileExistsError):
                moving.move(copy, target, part=_back_part(work, file))
                break


def _not_in(folder: Path | None, work: Path, manifest: Manifest) -> list[str]:
    """Name the files that are not in the folder, neither hidden nor under their own names."""
    return [
        file.dropped_name
        for file in manifest.files
        if folder is None
        or not any(map(signature_of, (_claimed(folder, work, file), folder / file.dropped_name)))
    ]


def _is_same(inbox: Path, manifest: Manifest) -> bool:
    """Say whether this is the inbox that the files were taken from, and not its empty mount point."""
    try:
        return bool(inbox.stat().st_ino == manifest.inbox)
    except OSError:
        return False


def _half_taken(work: Path, folder: Path, elsewhere: list[str]) -> str:
    named = ", ".join(elsewhere[:3]) + (f" and {len(elsewhere) - 3} more" if len(elsewhere) > 3 else "")
    return (
        f"is half taken in: {named} {'is' if len(elsewhere) == 1 else 'are'} not in {folder}: is its share "
        "mounted? The job is resumed when the files are there; if they are gone for good, drop what is in "
        f"{work / INPUTS} again and move the folder away"
    )
