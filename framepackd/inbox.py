"""What lies in the inbox: which files belong together, which have settled, which wait and why.

Only looks, never touches. Events of the file system wake a scan; a scan decides.
"""

import os
import re
import stat
import time
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from framepack_core.errors import RequestError
from framepackd.names import as_utf8
from framepackd.settings import DEFAULTS_FILE, read_settings_file

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
# Hidden files cover rsync's and most of Syncthing's temporaries.
IGNORED = re.compile(
    r"^\.|^~syncthing~|~$|\.(part|partial|tmp|temp|crdownload|download|filepart|swp)$|^(desktop\.ini|thumbs\.db)$",
    re.IGNORECASE,
)
MAX_NAME_BYTES = 180  # of the 255 there are: ours get prefixes and suffixes on the way
IGNORED_FOLDERS = re.compile(r"^\.|^(@eaDir|__MACOSX|lost\+found)$")
END_FRAME = re.compile(r"^(?P<name>.+)(\.end|_end|_last_frame)$")
FIRST_FRAME = re.compile(r"^(?P<name>.+)_first_frame$")
CHAIN = re.compile(r"^(?P<name>.+)_frame_\d+$")
FRAME_DIFF = re.compile(r"^(?P<name>.+)_frame_diff$")


class Signature(NamedTuple):
    """What must stand still for a file to count as complete."""

    size: int
    mtime_ns: int
    inode: int


class Found(NamedTuple):
    """A file in the inbox."""

    signature: Signature
    arrived: float  # ctime: when it came to have this name here
    regular: bool


@dataclass
class Group:
    """The files of one NAME, by the role they play; paths are relative to the inbox."""

    folder: str
    name: str
    files: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    defaults: list[str] = field(
        default_factory=list
    )  # _defaults.toml files that hold for it, outermost first
    signatures: dict[str, Signature] = field(default_factory=dict)  # of all of them, when they had settled

    @property
    def paths(self) -> list[str]:
        """Give all files, the picture and its text first."""
        order = ("image", "text", "end", "settings", "diff", "chain", "unknown")
        return [path for role in order for path in sorted(self.files.get(role, []))]

    def only(self, role: str) -> str | None:
        """Give the file of a role that exists once, if at all."""
        paths = self.files.get(role)
        return paths[0] if paths else None


@dataclass(frozen=True)
class Waiting:
    """Files that are not a job yet."""

    folder: str
    name: str
    files: tuple[str, ...]
    missing: str  # the file that is missing, or what is in the way
    since: str

    def as_json(self) -> dict[str, object]:
        """Give it as ``status --json`` has it."""
        return {
            "name": self.name,
            "folder": self.folder,
            "files": list(self.files),
            "missing": self.missing,
            "since": self.since,
        }


@dataclass(frozen=True)
class Scan:
    """What one look at the inbox found."""

    ready: tuple[Group, ...]
    waiting: tuple[Waiting, ...]
    unsettled: bool  # something still moves: look again soon


class Inbox:
    """Scans the inbox, and remembers between scans since when each file has stood still."""

    def __init__(
        self,
        root: Path,
        settle_seconds: float,
        now: Callable[[], float] = time.monotonic,
        *,
        prompted: bool = False,
    ) -> None:
        """Look at ``root``; ``now`` is a clock that never jumps, ``prompted`` if the config has a prompt."""
        self.root = root
        self._prompted = prompted
        self._settle_seconds = settle_seconds
        self._now = now
        self._still_since: dict[str, tuple[Signature, float]] = {}
        self.held: dict[tuple[str, str], str] = {}  # groups that could not be taken, and why

    def scan(self, missed_job: Callable[[str, str], str | None] = lambda folder, name: None) -> Scan:
        """Look once. ``missed_job`` names the job that was taken earlier under a folder and name."""
        found = list_files(self.root)
        moving = self._moving(found)
        ready, waiting = [], []
        unsettled = False
        for group in group_files(found):
            defaults = group.defaults = defaults_above(group.folder, found)
            group.signatures = {path: found[path].signature for path in (*group.paths, *defaults)}
            if any(path in moving for path in (*group.paths, *defaults)):
                unsettled = True
                continue
            missing = self._missing(group, defaults, found, missed_job)
            if missing is None:
                ready.append(group)
            else:
                waiting.append(_waiting(group, missing, found))
        ready.sort(key=lambda group: max(found[path].arrived for path in group.paths))
        return Scan(tuple(ready), tuple(waiting), unsettled)

    def _moving(self, found: dict[str, Found]) -> set[str]:
        """Remember what has changed, and name the files that have not stood still for long enough."""
        now = self._now()
        remembered = self._still_since
        self._still_since = {
            path: remembered[path]
            if path in remembered and remembered[path][0] == entry.signature
            else (entry.signature, now)
            for path, entry in found.items()
        }
        return {path for path, (_, since) in self._still_since.items() if now - since < self._settle_seconds}

    def _missing(
        self,
        group: Group,
        defaults: list[str],
        found: dict[str, Found],
        missed_job: Callable[[str, str], str | None],
    ) -> str | None:
        """Say what keeps a settled group from being a job; None if nothing does."""
        return (
            self.held.get((group.folder, group.name))
            or _in_the_way(group, defaults, found)
            or self._missing_partner(group, defaults, missed_job)
        )

    def _missing_partner(
        self, group: Group, defaults: list[str], missed_job: Callable[[str, str], str | None]
    ) -> str | None:
        if not group.files.get("image"):
            missed = missed_job(group.folder, group.name)
            if missed is not None:
                return f"{group.name}.png (job {missed} was taken before this came)"
            return f"{group.name}.png"
        prompted = self._prompted or bool(group.files.get("text"))
        for path in defaults:
            try:
                prompted |= "prompt" in read_settings_file(self.root / path, path)
            except (RequestError, OSError) as error:
                return str(error)  # one mistake there must not fail every job below
        if prompted:
            return None
        own = group.only("settings")
        if own is None:
            return f"{group.name}.txt"
        try:
            return None if "prompt" in read_settings_file(self.root / own, own) else f"{group.name}.txt"
        except OSError:
            return own
        except RequestError:
            return None  # a mistake in the job's own settings: it is taken, and fails with the reason


def _in_the_way(group: Group, defaults: list[str], found: dict[str, Found]) -> str | None:
    """Name what a person has to sort out first."""
    for path in (*group.paths, *defaults):
        if path != as_utf8(path):
            return f"{as_utf8(_name(path))} has a name that is not UTF-8: rename it"
        if len(_name(path).encode()) > MAX_NAME_BYTES:
            return f"{_name(path)[:20]}… has a name of more than {MAX_NAME_BYTES} bytes: rename it"
        if not found[path].regular:
            return f"{_name(path)} is not a regular file: copy the file itself here"
    if group.files.get("unknown"):
        return (
            f"{_name(group.files['unknown'][0])} is not of a known type ({', '.join(PICTURES)}, .txt, .toml)"
        )
    if group.files.get("chain"):
        return f"{group.name}_frame_N: videos from a chain of frames cannot be made yet"
    for role in ("image", "text", "end", "settings", "diff"):
        several = group.files.get(role, [])
        if len(several) > 1:
            return f"only one of {' and '.join(sorted(map(_name, several)))} may stay"
    empty = [path for path in group.paths if _is_picture(path) and found[path].signature.size == 0]
    return f"{_name(empty[0])} is empty (0 bytes)" if empty else None


def _waiting(group: Group, missing: str, found: dict[str, Found]) -> Waiting:
    since = max(found[path].arrived for path in group.paths)
    return Waiting(
        folder=as_utf8(group.folder),
        name=as_utf8(group.name),
        files=tuple(as_utf8(_name(path)) for path in group.paths),
        missing=missing,
        since=datetime.fromtimestamp(since, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    )


def list_files(root: Path) -> dict[str, Found]:
    """List the files below the inbox that are not to be ignored, by relative path.

    Raises:
        OSError: the inbox itself cannot be read.
    """
    found: dict[str, Found] = {}
    folders = [root]
    while folders:
        folder = folders.pop()
        try:
            entries = list(os.scandir(folder))
        except OSError:
            if folder == root:
                raise
            continue  # a folder that vanished, or that is not ours to read
        for entry in entries:
            try:
                status = entry.stat(follow_symlinks=False)
            except OSError:
                continue  # vanished, or in a folder that lets nobody look closer
            if stat.S_ISDIR(status.st_mode):
                if not IGNORED_FOLDERS.search(entry.name):
                    folders.append(Path(entry.path))
            elif not IGNORED.search(entry.name):
                found[str(Path(entry.path).relative_to(root))] = Found(
                    Signature(status.st_size, status.st_mtime_ns, status.st_ino),
                    status.st_ctime,
                    stat.S_ISREG(status.st_mode),
                )
    return found


def group_files(paths: Iterable[str]) -> list[Group]:
    """Sort files into groups of one NAME each, by the naming rules; ``_defaults.toml`` belongs to none.

    Names are compared as NFC: macOS sends them decomposed.
    """
    by_folder: dict[str, list[str]] = defaultdict(list)
    for path in paths:
        by_folder[_folder(path)].append(path)
    return [group for folder in sorted(by_folder) for group in _group_folder(folder, by_folder[folder])]


def _group_folder(folder: str, paths: list[str]) -> Iterable[Group]:
    own_names = {_stem(path) for path in paths if _suffix(path) in (".txt", ".toml")}
    groups: dict[tuple[str, bool], Group] = {}
    for path in sorted(paths):
        if _is_defaults(path):
            continue
        name, role = _owner(path, own_names)
        # A file of another kind shares its fate with nobody, whatever its name.
        groups.setdefault((name, role == "unknown"), Group(folder, name)).files[role].append(path)
    return groups.values()


def _owner(path: str, own_names: set[str]) -> tuple[str, str]:
    """Say to which NAME a file belongs, and as what."""
    stem, suffix = _stem(path), _suffix(path)
    if suffix == ".toml":
        return stem, "settings"
    if suffix == ".txt":
        difference = FRAME_DIFF.match(stem)
        return (difference["name"], "diff") if difference else (stem, "text")
    if suffix not in PICTURES:
        return _name(path), "unknown"
    if stem not in own_names:  # a text of exactly this name wins over the suffixes
        for pattern, role in ((END_FRAME, "end"), (FIRST_FRAME, "image"), (CHAIN, "chain")):
            match = pattern.match(stem)
            if match:
                return match["name"], role
    return stem, "image"


def defaults_above(folder: str, paths: Iterable[str]) -> list[str]:
    """List the ``_defaults.toml`` files that hold for a folder, the outermost first.

    >>> defaults_above("a/b", ["_defaults.toml", "a/b/_defaults.TOML", "c/_defaults.toml"])
    ['_defaults.toml', 'a/b/_defaults.TOML']
    """
    above = ("", *(f"{parent}" for parent in reversed(PurePosixPath(folder).parents)), folder)
    holding = [path for path in paths if _is_defaults(path) and _folder(path) in above]
    return sorted(holding, key=lambda path: (path.count("/"), path))


def _is_defaults(path: str) -> bool:
    stem, _, suffix = _name(path).rpartition(".")
    return f"{stem}.{suffix.lower()}" == DEFAULTS_FILE


def _folder(path: str) -> str:
    return path.rpartition("/")[0]


def _name(path: str) -> str:
    return path.rpartition("/")[2]


def _stem(path: str) -> str:
    return unicodedata.normalize("NFC", _name(path).rpartition(".")[0])


def _suffix(path: str) -> str:
    return "." + path.rpartition(".")[2].lower() if "." in _name(path) else ""


def _is_picture(path: str) -> bool:
    return _suffix(path) in PICTURES
