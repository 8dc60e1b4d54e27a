"""Lists the files in the inbox: follows no symbolic link, opens no file, uses bounded memory."""

import errno
import os
import re
import stat
from pathlib import Path
from typing import NamedTuple

from framepackd.files import PART_PREFIX, UNREACHABLE, folder_below

# Hidden files cover rsync's and most of Syncthing's temporaries.
IGNORED = re.compile(
    r"^\.|^~syncthing~|~\Z|\.(part|partial|tmp|temp|crdownload|download|filepart|swp|!sync)\Z|"
    # Of Windows, also with what Samba and WSL show as files beside one; of the Finder, also as SMB has it.
    r"^(desktop\.ini|thumbs\.db(:encryptable)?|ehthumbs(_vista)?\.db|icon[\r\uf00d])\Z|:Zone\.Identifier\Z",
    re.IGNORECASE,
)
# Recycle bins, snapshots and other folders that servers and systems keep in a share. Windows, macOS and SMB
# ignore case, Linux does not.
IGNORED_FOLDERS = re.compile(
    r"^\.|^(?i:"
    r"@eaDir|@tmp|@sharebin|@SynoResource|#recycle|#snapshot|"  # Synology
    r"@Recycle|@Recently-Snapshot|@Transcode|"  # QNAP
    r"\$RECYCLE\.BIN|System Volume Information|"  # Windows
    r"__MACOSX|Network Trash Folder|Temporary Items|"  # macOS
    r"~snapshot"  # NetApp
    r")\Z|^(RECYCLER|lost\+found)\Z"
)
MAX_FOLDER = 1024  # bytes of a folder's path in the inbox; Linux allows 4096 for a whole path
MAX_FILE_BYTES = 256 << 20  # a hundred megapixels take 300 MB as BMP, much less as anything else
MAX_VIDEO_BYTES = 2 << 30  # 120 s of latents at 640x640 take 370 MB, the video less
VIDEO_SUFFIXES = (".mp4", ".safetensors")
MAX_FILES = 50_000  # which take 130 MB of memory
MAX_PARTS = 10_000  # hidden files of our own; only a crash leaves any
CLOSED = "may not be read by this user: correct its permissions, or those of a folder above it"
REMEDIES = UNREACHABLE | {
    errno.ENOENT: "is not there: mount its share, or make it again",
    errno.ENOTDIR: "is no folder: move away what lies in its place",
    errno.EACCES: CLOSED,
    errno.EPERM: CLOSED,
    errno.ELOOP: "is a symbolic link that leads in a circle: correct it",
    errno.EMFILE: "cannot be opened: too many files are open, raise LimitNOFILE= or ulimit -n",
    errno.ENFILE: "cannot be opened: too many files are open on this machine, raise fs.file-max",
    errno.EOVERFLOW: f"holds too many files: at most {MAX_FILES} in the inbox are listed: take some out",
    errno.ENAMETOOLONG: f"lies too deep: a folder's path in the inbox may have {MAX_FOLDER} bytes",
}


class Signature(NamedTuple):
    """What must stay the same for a file to count as complete."""

    size: int
    mtime_ns: int
    inode: int


class Found(NamedTuple):
    """A file in the inbox."""

    signature: Signature
    arrived: float  # ctime: when it got this name here
    problem: str | None = None  # why it cannot be taken; always set for a folder


class Listing(NamedTuple):
    """What one walk through the inbox found, by relative path."""

    files: dict[str, Found]
    parts: dict[str, float]  # hidden files of our own, and since when they are there


def look_through(root: Path) -> Listing:
    """List the files below the inbox, except ignored ones, and our own hidden files, by relative path.

    A folder that cannot be listed whole is an entry itself, with the reason.

    Raises:
        OSError: the inbox itself cannot be read.
    """
    found, parts = Listing({}, {})
    folders = {"": _found(root.stat())}
    while folders:
        folder, itself = folders.popitem()
        try:
            found |= _list_folder(root, folder, folders, parts, MAX_FILES - len(found))
        except FileNotFoundError:
            if not folder:
                raise
        except OSError as error:
            if not folder and error.errno != errno.EOVERFLOW:
                raise
            found[folder or "."] = itself._replace(problem=why_not_read(error))
    return Listing(found, parts)


def _list_folder(
    root: Path, folder: str, folders: dict[str, Found], parts: dict[str, float], limit: int
) -> dict[str, Found]:
    """List the files of one folder, and add the folders in it to ``folders``, our own parts to ``parts``."""
    if len(os.fsencode(folder)) > MAX_FOLDER:
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
    found: dict[str, Found] = {}
    with folder_below(root, folder) as opened, os.scandir(opened) as entries:
        for entry in entries:
            path = f"{folder}/{entry.name}" if folder else entry.name
            try:
                status = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
            except PermissionError:
                raise  # the folder may be listed, but not its files' status read
            except OSError as error:
                found[path] = Found(Signature(0, 0, 0), 0.0, f"cannot be checked ({error.strerror})")
                continue
            if stat.S_ISDIR(status.st_mode):
                if not IGNORED_FOLDERS.search(entry.name):
                    folders[path] = _found(status)
            elif not IGNORED.search(entry.name):
                found[path] = _found(status, entry.name)
            elif entry.name.startswith(PART_PREFIX) and len(parts) < MAX_PARTS:
                parts[path] = status.st_ctime
            if len(found) + len(folders) > limit:
                raise OSError(errno.EOVERFLOW, os.strerror(errno.EOVERFLOW))
    return found


def why_not_read(error: OSError) -> str:
    """Say why a folder cannot be read, and what to do; the text follows the folder's name."""
    remedy = f"cannot be read ({error.strerror}): correct that"
    return REMEDIES.get(error.errno or 0, remedy)


def _found(status: os.stat_result, name: str = "") -> Found:
    problem = None
    most = MAX_VIDEO_BYTES if name.lower().endswith(VIDEO_SUFFIXES) else MAX_FILE_BYTES
    if not stat.S_ISREG(status.st_mode):
        problem = "is not a regular file: copy the file itself here"
    elif status.st_size > most:
        problem = f"has {status.st_size} bytes: files of more than {most >> 20} MiB are not taken"
    return Found(Signature(status.st_size, status.st_mtime_ns, status.st_ino), status.st_ctime, problem)
