"""Locks a state folder: only one daemon, or one command, may write there."""

import errno
import fcntl
import os
import pwd
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

LOCK = "lock"
LOCK_RETRY_SECONDS = 1.0  # is_held takes the lock for a moment


class AlreadyRunningError(Exception):
    """Another daemon holds the state folder."""


class Lock:
    """The right to write in a state folder; the kernel takes it back when the process dies."""

    def __init__(self, state_dir: Path, *, waiting: Callable[[int], None] | None = None) -> None:
        """Take the lock.

        A daemon that was killed while it waits for a disk that hangs keeps the lock until the disk answers.
        ``waiting`` makes this wait for such a predecessor, however long, and is called about every second
        with its process id.

        Raises:
            AlreadyRunningError: another process holds it.
        """
        self._file = _open_lock(state_dir / LOCK)
        deadline = time.monotonic() + LOCK_RETRY_SECONDS
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno != errno.EWOULDBLOCK:
                    raise
                pid = holder(state_dir)
                if time.monotonic() > deadline:
                    if waiting is None or pid is None or not _is_on_its_way_out(pid):
                        raise AlreadyRunningError(
                            f"a framepackd (pid {pid or 'unknown'}) runs on {state_dir} already: "
                            "stop it first, or set another state_dir"
                        ) from error
                    waiting(pid)
                    deadline = time.monotonic() + LOCK_RETRY_SECONDS
                time.sleep(0.05)
        self._file.truncate(0)
        self._file.write(str(os.getpid()))
        self._file.flush()

    def release(self) -> None:
        """Release the lock."""
        self._file.truncate(0)
        self._file.close()


def _open_lock(path: Path) -> TextIO:
    """Open the lock so that only this user can: whoever can open it can hold it and so stop the service."""
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600), "a+")


def _owner(state_dir: Path) -> str:
    user = state_dir.stat().st_uid
    try:
        return pwd.getpwuid(user).pw_name
    except KeyError:
        return f"'#{user}'"  # how sudo takes a number


def is_held(state_dir: Path) -> bool:
    """Say whether a daemon holds the state folder.

    Raises:
        OSError: the lock cannot be read.
    """
    try:
        with (state_dir / LOCK).open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except PermissionError as error:
        owner = _owner(state_dir)
        raise PermissionError(
            f"only {owner} and root may ask: put sudo -u {owner} before the command"
        ) from error
    except OSError as error:
        if error.errno == errno.EWOULDBLOCK:
            return True
        raise
    return False


def holder(state_dir: Path) -> int | None:
    """Give the process id that a daemon wrote into its lock."""
    try:
        return int((state_dir / LOCK).read_text())
    except (OSError, ValueError):
        return None


def _is_on_its_way_out(pid: int) -> bool:
    """Say whether a process was killed and cannot end yet, or systemd has replaced it by this one."""
    process = Path(f"/proc/{pid}")
    try:
        if any(map(_is_killed, process.glob("task/*/status"))):
            return True
        # A service has one daemon: another one in our control group is its predecessor.
        ours = Path("/proc/self/cgroup").read_text()
        return bool(os.environ.get("NOTIFY_SOCKET")) and (process / "cgroup").read_text() == ours
    except OSError:  # it has ended meanwhile
        return True


def _is_killed(status: Path) -> bool:
    """Say whether a thread has ended, or ends as soon as its system call returns."""
    facts = dict(line.split(":\t", 1) for line in status.read_text().splitlines() if ":\t" in line)
    pending = int(facts["SigPnd"], 16) | int(facts["ShdPnd"], 16)
    return facts["State"][0] in "ZX" or bool(pending >> (signal.SIGKILL - 1) & 1)
