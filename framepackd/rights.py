"""Sets who may do what on the disk: the group drops and collects, all else is the daemon's user's.

Who may drop files can have videos made and no more: holding the lock would stop the service, a work folder
could be written under a running job, and what is compiled is code that the daemon runs.
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
SHARED = 0o2770  # with setgid: what anybody puts there belongs to the group
PRIVATE = 0o700
STICKY = 0o1000  # where somebody has set it, members remove only their own files: that stays
WRITABLE = 0o022  # by group or others
EVERYBODY = ("users",)  # where a system puts all users into one group, nothing is opened to that
FORMERLY_COMPILED = "compiled"  # in the state folder, of earlier versions; now in the cache folder


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
    """Correct the modes in the state folder and the cache folder; tell what a person has to correct.

    For the holder of the lock. Folders outside the state folder, and on other file systems, are the
    administrator's and stay as they are. Looks at no more than the state folder's own entries: a closed
    folder closes everything below it.
    """
    changed: list[str] = []
    problems: list[Problem] = []
    owner = config.state_dir.stat().st_uid
    for path, wanted in _wrong(config):
        problem = _correct(path, wanted, owner, changed)
        problems += [problem] if problem else []
    problems += _close_cache(config, changed)
    if changed:
        log.warning("rights put right, so that who may drop can do no more: %s", ", ".join(changed))
    return problems


def wrong(config: Config) -> list[Path]:
    """Name what in the state folder has another mode than it should have."""
    return [path for path, _ in _wrong(config)]


def share(path: Path) -> None:
    """Give a file that was written into a drop folder the rights of that folder, for reading."""
    mode = 0o600 | (path.parent.stat().st_mode & 0o044)
    if stat.S_IMODE(path.stat().st_mode) != mode:
        with contextlib.suppress(PermissionError):  # a file system without such rights
            path.chmod(mode)


def _for_group(mode: int, group: int) -> int:
    """Take the group's part away where everybody is in that group."""
    try:
        name = grp.getgrgid(group).gr_name
    except KeyError:
        name = ""
    return mode & PRIVATE if name in EVERYBODY else mode


def _wrong(config: Config) -> Iterator[tuple[Path, int]]:
    """Give each entry of the state folder that has not the mode it should have, with that mode."""
    state = config.state_dir
    itself = state.resolve()
    device = itself.stat().st_dev
    shared = {folder: SHARED for folder in _drop_folders(config) if folder.is_relative_to(state)}
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
        # Of files the device tells nothing: an overlay gives that of the layer that a file lies in.
        mounted = folder and status.st_dev != device
        if stat.S_ISLNK(status.st_mode) or mounted or (fixed is not None and not folder):
            continue
        mode = stat.S_IMODE(status.st_mode)
        opened = 0 if fixed is None else _for_group(fixed, status.st_gid) | (mode & STICKY)
        wanted = opened or mode & PRIVATE
        if mode != wanted:
            yield path, wanted


def _drop_folders(config: Config) -> tuple[Path, ...]:
    return config.inbox, config.outbox, config.failed, config.lora_dir


def _correct(path: Path, wanted: int, owner: int, changed: list[str]) -> Problem | None:
    """Set a mode, through no symbolic link; a problem if that takes another user."""
    try:
        descriptor = os.open(path, os.O_PATH | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    try:
        status = os.fstat(descriptor)
        mode = stat.S_IMODE(status.st_mode)
        if status.st_uid not in (owner, os.geteuid()):
            raise PermissionError  # root could, but it is not the service's
        os.chmod(f"/proc/self/fd/{descriptor}", wanted)  # noqa: PTH101 - of what was looked at, whatever has its name
    except OSError:
        if mode & ~wanted & WRITABLE == 0 and wanted not in (WALKED, SHARED):
            return None  # somebody else's, and nobody can harm it
        return Problem(
            "rights",
            f"{path} has the mode {mode:04o} and this user cannot change it, so who may drop files could do "
            f"more than that: sudo chmod {wanted:04o} {shlex.quote(str(path))}",
        )
    finally:
        os.close(descriptor)
    changed.append(f"{path.name} {mode:04o} to {wanted:04o}")
    return None


def _close_cache(config: Config, changed: list[str]) -> list[Problem]:
    """Remove compiled code that others could have written, and close the folder for new code."""
    former = config.state_dir / FORMERLY_COMPILED
    if former.is_dir() and not former.is_symlink():
        shutil.rmtree(former, ignore_errors=True)
        changed.append(f"{former} removed: what is compiled is made anew in {config.cache_dir}")
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
    for entry in list(os.scandir(cache)):  # even where the folder is closed by now: systemd does so before us
        if entry.stat(follow_symlinks=False).st_mode & WRITABLE and entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry, ignore_errors=True)
            changed.append(f"{entry.path} removed: others could write there, and it is code")
    if status.st_mode & 0o077:
        cache.chmod(PRIVATE)
        changed.append(f"{cache} {stat.S_IMODE(status.st_mode):04o} to {PRIVATE:04o}")
    return []
