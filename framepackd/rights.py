"""Sets the rights on the disk: the group drops and collects files, the daemon's user alone does all else.

People who may drop files can have videos generated, and no more. With the lock they could stop the service,
with a work folder change a running job; and compiled files are code that the daemon runs.
"""

import contextlib
import grp
import logging
import os
import shlex
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from framepackd import files
from framepackd.problems import Problem
from framepackd.settings.config import Config

log = logging.getLogger(__name__)

UMASK = 0o077  # of the daemon and its worker; files in the drop folders are given their modes one by one
WALKED = 0o750  # the state folder: the group goes through it to the folders below
SHARED = 0o2770  # with setgid: files that anybody puts there belong to the group
PRIVATE = 0o700
STICKY = 0o1000  # kept where somebody has set it: members then remove only their own files
WRITABLE = 0o022  # by group or others
EVERYBODY = ("users",)  # groups that some systems put all users into: nothing is opened to them
FORMERLY_COMPILED = "compiled"  # in the state folder, of earlier versions; now in the cache folder


@contextlib.contextmanager
def own_umask() -> Iterator[None]:
    """Have files that are made inside the block be this user's alone, unless they are given a mode."""
    before = os.umask(UMASK)
    try:
        yield
    finally:
        os.umask(before)


def make_folders(config: Config) -> None:
    """Make the folders that the daemon needs and that are missing.

    Raises:
        OSError: one cannot be made.
    """
    for folder in config.made_folders:
        files.make_folder(folder, mode_of(folder, config))


def mode_of(folder: Path, config: Config) -> int:
    """Give the mode of a folder that the daemon makes."""
    if folder == config.jobs_dir:
        return PRIVATE
    mode = WALKED if folder == config.state_dir else SHARED
    return _for_group(mode, os.getegid())


def put_right(config: Config) -> list[Problem]:
    """Correct the modes in the state folder and the cache folder; report those that a person has to correct.

    For the holder of the lock. Folders outside the state folder, and on other file systems, are the
    administrator's and stay as they are. Checks only the state folder's own entries: a closed folder closes
    everything below it.
    """
    changed: list[str] = []
    problems: list[Problem] = []
    owner = config.state_dir.stat().st_uid
    for path, wanted in _wrong(config):
        problem = _correct(path, wanted, owner, changed)
        problems += [problem] if problem else []
    problems += _close_cache(config, changed)
    if changed:
        log.warning("rights corrected, so that those who drop files can do no more: %s", ", ".join(changed))
    return problems


def wrong(config: Config) -> list[Path]:
    """List the entries of the state folder whose mode is wrong."""
    return [path for path, _ in _wrong(config)]


def share(path: Path) -> None:
    """Make a file that was written into a drop folder readable for those who can read that folder."""
    mode = 0o600 | (path.parent.stat().st_mode & 0o044)
    if stat.S_IMODE(path.stat().st_mode) != mode:
        with contextlib.suppress(PermissionError):  # a file system without such rights
            path.chmod(mode)


def _for_group(mode: int, group: int) -> int:
    """Remove the group's rights from a mode where everybody is in that group."""
    try:
        name = grp.getgrgid(group).gr_name
    except KeyError:
        name = ""
    return mode & PRIVATE if name in EVERYBODY else mode


def _wrong(config: Config) -> Iterator[tuple[Path, int]]:
    """Give each entry of the state folder whose mode is wrong, with the mode that it should have."""
    state = config.state_dir
    itself = state.resolve()
    device = itself.stat().st_dev
    dropped = (config.inbox, config.outbox, config.failed, config.lora_dir)
    shared = {folder: SHARED for folder in dropped if folder.is_relative_to(state)}
    on_the_way = {
        above: WALKED
        for folder in shared
        for above in folder.parents
        if above.is_relative_to(state) and above != state
    }
    entries = {Path(entry.path): None for entry in os.scandir(state)}
    for path, fixed in (entries | on_the_way | shared | {itself: WALKED}).items():
        try:
            status = path.lstat()
        except OSError:  # gone meanwhile
            continue
        folder = stat.S_ISDIR(status.st_mode)
        # Of folders only: in an overlay a file has the device of its layer.
        mounted = folder and status.st_dev != device
        if stat.S_ISLNK(status.st_mode) or mounted or (fixed is not None and not folder):
            continue
        mode = stat.S_IMODE(status.st_mode)
        opened = 0 if fixed is None else _for_group(fixed, status.st_gid) | (mode & STICKY)
        wanted = opened or mode & PRIVATE
        if mode != wanted:
            yield path, wanted


def _correct(path: Path, wanted: int, owner: int, changed: list[str]) -> Problem | None:
    """Set a mode, through no symbolic link; gives a problem if this user may not."""
    try:
        descriptor = os.open(path, os.O_PATH | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    try:
        status = os.fstat(descriptor)
        mode = stat.S_IMODE(status.st_mode)
        if status.st_uid not in (owner, os.geteuid()):
            raise PermissionError  # root could, but it is not the service's
        os.chmod(f"/proc/self/fd/{descriptor}", wanted)  # noqa: PTH101 - of what was checked, whatever has its name now
    except OSError:
        if mode & ~wanted & WRITABLE == 0 and wanted not in (WALKED, SHARED):
            return None  # another user's, and nobody else can change it
        return Problem(
            "rights",
            f"{path} has the mode {mode:04o} and this user cannot change it, so whoever may drop files could "
            f"do more than that: sudo chmod {wanted:04o} {shlex.quote(str(path))}",
        )
    finally:
        os.close(descriptor)
    changed.append(f"{path.name} {mode:04o} to {wanted:04o}")
    return None


def _close_cache(config: Config, changed: list[str]) -> list[Problem]:
    """Remove compiled code that others could have written, and close its folder to others."""
    former = config.state_dir / FORMERLY_COMPILED
    if former.is_dir() and not former.is_symlink():
        shutil.rmtree(former, ignore_errors=True)
        changed.append(f"{former} removed: code is compiled again, into {config.cache_dir}")
    cache = config.cache_dir
    try:
        status = cache.stat()
    except OSError:  # made when something is compiled
        return []
    if status.st_uid != os.geteuid() or not stat.S_ISDIR(status.st_mode):
        return [
            Problem(
                "rights",
                f"{cache} is not a folder of this user, and code in it would be run: move it away, or set "
                "XDG_CACHE_HOME",
            )
        ]
    for entry in list(os.scandir(cache)):  # even if the folder is closed: systemd closes it before the start
        if entry.stat(follow_symlinks=False).st_mode & WRITABLE and entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry, ignore_errors=True)
            changed.append(f"{entry.path} removed: others could write there, and it is code")
    if status.st_mode & 0o077:
        cache.chmod(PRIVATE)
        changed.append(f"{cache} {stat.S_IMODE(status.st_mode):04o} to {PRIVATE:04o}")
    return []
