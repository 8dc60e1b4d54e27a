"""List the files in the inbox: through no symbolic link, opening none, no more than fit into memory."""

import errno
import os
import re
import stat
from pathlib import Path
from typing import NamedTuple

from framepackd.files import folder_below

# Hidden files cover rsync's and most of Syncthing's temporaries.
IGNORED = re.compile(
    r"^\.|^~syncthing~|~\Z|\.(part|partial|tmp|temp|crdownload|download|filepart|swp)\Z|"
    r"^(desktop\.ini|thumbs\.db)\Z",
    re.IGNORECASE,
)
IGNORED_FOLDERS = re.compile(r"^\.|^(@eaDir|__MACOSX|lost\+found)\Z")
MAX_FOLDER = 1024  # bytes of a folder's path in the inbox, of the 4096 there are for a whole one
MAX_FILE_BYTES = 256 << 20  # a hundred megapixels take 300 MB as BMP, much less as anything else
MAX_VIDEO_BYTES = 2 << 30  # 120 s of latents at 640x640 take 370 MB, the video less
VIDEO_SUFFIXES = (".mp4", ".safetensors")
MAX_FILES = 50_000  # 130 MB of memory to look at


class Signature(NamedTuple):
    """What must stand still for a file to count as complete."""

    size: int
    mtime_ns: int
    inode: int


class Found(NamedTuple):
    """A file in the inbox."""

    signature: Signature
    arrived: float  # ctime: when it came to have this name here
    problem: str | None = None  # why it cannot be taken, whatever it is called; folders are listed only so


def list_files(root: Path) -> dict[str, Found]:
    """List the files below the inbox that are not to be ignored, by relative path.

    A folder is listed whole, or stands for all that is in it with the reason why it is not.

    Raises:
        OSError: the inbox itself cannot be read.
    """
    found: dict[str, Found] = {}
    folders = {"": _found(root.stat())}
    while folders:
        folder, itself = folders.popitem()
        try:
            found |= _list_folder(root, folder, folders, MAX_FILES - len(found))
        except FileNotFoundError:
            if not folder:
                raise
        except OSError as error:
            if not folder and error.errno != errno.EOVERFLOW:
                raise
            found[folder or "."] = itself._replace(problem=_why_not_listed(error))
    return found


def _list_folder(root: Path, folder: str, folders: dict[str, Found], limit: int) -> dict[str, Found]:
    """List the files of one folder, and add the folders in it to ``folders``."""
    if len(os.fsencode(folder)) > MAX_FOLDER:
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
    found: dict[str, Found] = {}
    with folder_below(root, folder) as opened, os.scandir(opened) as entries:
        for entry in entries:
            try:
                status = entry.stat(follow_symlinks=False)
            except OSError:
                continue  # vanished, or in a folder that lets nobody look closer
            path = f"{folder}/{entry.name}" if folder else entry.name
            if stat.S_ISDIR(status.st_mode):
                if not IGNORED_FOLDERS.search(entry.name):
                    folders[path] = _found(status)
            elif not IGNORED.search(entry.name):
                found[path] = _found(status, entry.name)
            if len(found) + len(folders) > limit:
                raise OSError(errno.EOVERFLOW, os.strerror(errno.EOVERFLOW))
    return found


def _why_not_listed(error: OSError) -> str:
    if error.errno == errno.EOVERFLOW:
        return f"holds too many files: at most {MAX_FILES} in the inbox are looked at: take some out"
    if error.errno == errno.ENAMETOOLONG:
        return f"lies too deep: a folder's path in the inbox may have {MAX_FOLDER} bytes"
    return f"cannot be looked into ({error.strerror}): correct its permissions"


def _found(status: os.stat_result, name: str = "") -> Found:
    problem = None
    most = MAX_VIDEO_BYTES if name.lower().endswith(VIDEO_SUFFIXES) else MAX_FILE_BYTES
    if not stat.S_ISREG(status.st_mode):
        problem = "is not a regular file: copy the file itself here"
    elif status.st_size > most:
        problem = f"has {status.st_size} bytes: files of more than {most >> 20} MiB are not taken"
    return Found(Signature(status.st_size, status.st_mtime_ns, status.st_ino), status.st_ctime, problem)
