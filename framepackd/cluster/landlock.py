"""Confines this process to some folders for good, by Landlock of the Linux kernel."""

import ctypes
import importlib.util
import os
import sys
from collections.abc import Iterable
from pathlib import Path

# Numbers and constants of include/uapi/linux/landlock.h; the numbers are the same on all architectures.
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_VERSION, _PATH_BENEATH, _PR_SET_NO_NEW_PRIVS = 1, 1, 38
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_TRUNCATE, _IOCTL_DEVICE = 1 << 14, 1 << 15
_ALL_OF_FIRST = (1 << 13) - 1  # executing, reading, writing, making and removing: what version 1 knows
_FIRST = 2  # before it, no confined process may move a file from one folder to another
_ADDED_BY_VERSION = {2: 1 << 13, 3: _TRUNCATE, 5: _IOCTL_DEVICE}  # REFER, TRUNCATE, IOCTL_DEV
_OF_FILES = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEVICE  # what a rule for a file may name
# From version 6: no abstract Unix sockets of others, no signals to others.
_SCOPES, _SCOPES_SINCE = 0b11, 6

READ = _EXECUTE | _READ_FILE | _READ_DIR
LIST = _READ_DIR
WRITE = _ALL_OF_FIRST | _ADDED_BY_VERSION[2] | _TRUNCATE


class _Ruleset(ctypes.Structure):
    _fields_ = [("files", ctypes.c_uint64), ("network", ctypes.c_uint64), ("scoped", ctypes.c_uint64)]


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = [("allowed", ctypes.c_uint64), ("folder", ctypes.c_int32)]


def code(*packages: str) -> list[tuple[Path, int]]:
    """Give the rules by which a process can import packages; what else lies beside them is out of reach."""
    places = [Path(sys.prefix), Path(sys.base_prefix)]
    for name in packages:
        found = importlib.util.find_spec(name)
        if found is not None and found.origin is not None:
            package = Path(found.origin).parent
            installed = any(package.parent.glob("*.dist-info"))  # then beside what it imports itself
            places.append(package.parent if installed else package)
    return [*((place, READ) for place in places), *((Path(entry), LIST) for entry in sys.path if entry)]


def version() -> int:
    """Give the version of Landlock in this kernel; 0 if there is none that serves."""
    found: int = _libc().syscall(_CREATE_RULESET, None, 0, _VERSION)
    return found if found >= _FIRST else 0


def confine(rules: Iterable[tuple[Path, int]]) -> bool:
    """Let this process and those that it starts reach nothing but these files and folders, for ever.

    Places that do not exist are left out. Threads that run already are not confined.

    Args:
        rules: what is allowed, :data:`READ`, :data:`LIST` or :data:`WRITE`, and where; below it too

    Returns:
        Whether it is confined; False where the kernel has no Landlock.

    Raises:
        OSError: the kernel refuses.
    """
    known = version()
    if not known:
        return False
    handled = _ALL_OF_FIRST | sum(right for since, right in _ADDED_BY_VERSION.items() if known >= since)
    asked = _Ruleset(handled, 0, _SCOPES if known >= _SCOPES_SINCE else 0)
    ruleset = _call(_CREATE_RULESET, ctypes.byref(asked), ctypes.sizeof(asked), 0)
    for place, allowed in rules:
        _allow(ruleset, place, allowed & handled)
    if _libc().prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl: no_new_privs was refused")
    _call(_RESTRICT_SELF, ruleset, 0)
    os.close(ruleset)
    return True


def _allow(ruleset: int, place: Path, allowed: int) -> None:
    try:
        opened = os.open(place, os.O_PATH | os.O_CLOEXEC)
    except (FileNotFoundError, PermissionError):
        return
    try:
        rights = allowed if place.is_dir() else allowed & _OF_FILES
        rule = _PathBeneath(rights, opened)
        if rights:
            _call(_ADD_RULE, ruleset, _PATH_BENEATH, ctypes.byref(rule), 0)
    finally:
        os.close(opened)


def _call(number: int, *arguments: object) -> int:
    result: int = _libc().syscall(number, *arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), f"Landlock: {os.strerror(ctypes.get_errno())}")
    return result


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
