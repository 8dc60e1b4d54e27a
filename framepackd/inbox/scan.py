"""Scans the inbox: which files have settled, which wait and why.

A scan changes nothing. Events of the file system wake the loop; only a scan decides.
"""

import contextlib
import itertools
import logging
import os
import time
import unicodedata
from bisect import bisect_left
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

from framepack_core.errors import RequestError
from framepackd.files import folder_below
from framepackd.inbox.conflicts import conflict_in
from framepackd.inbox.inspect import read_comment
from framepackd.inbox.listing import IGNORED, Found, Signature, look_through, why_not_read
from framepackd.inbox.naming import (
    MAX_NAME,
    OF_A_VIDEO,
    VIDEO,
    Group,
    defaults_above,
    defaults_by_folder,
    folder_of,
    folders_above,
    group_files,
    is_defaults,
    is_picture,
    name_of,
    suffix_of,
    why_unread,
)
from framepackd.inbox.reasons import reason_of
from framepackd.inbox.records import TYPE, Records
from framepackd.jobs import embedded
from framepackd.jobs.drafts import ROLE
from framepackd.jobs.report import WaitingReport
from framepackd.problems import Problem
from framepackd.settings.job_settings import read_settings_file
from framepackd.text import LAST, as_utf8

log = logging.getLogger(__name__)

Name = tuple[str, str]  # a folder, and a NAME in it
Came = tuple[str, str]  # the name of a file as NFC, and its path


@dataclass(frozen=True)
class Waiting:
    """Files that are not a job yet."""

    folder: str
    name: str
    files: tuple[str, ...]
    missing: str  # the name of a missing file, or a sentence that says what is in the way
    since: str

    def as_json(self) -> WaitingReport:
        """Give it as ``status --json`` has it."""
        return {
            "name": self.name,
            "folder": self.folder,
            "files": list(self.files),
            "missing": self.missing,
            "note": self.missing if " " in self.missing else f"missing: {self.missing}",
            "reason": reason_of(self.name, self.missing),
            "since": self.since,
        }


@dataclass(frozen=True)
class Scan:
    """What one scan of the inbox found."""

    ready: tuple[Group, ...]
    waiting: tuple[Waiting, ...]
    unsettled: bool  # a file is still changing: scan again soon
    parts: Mapping[str, float] = field(default_factory=dict)  # hidden files of our own, and since when


def trouble(inbox: Path, error: OSError) -> Problem:
    """Report that the inbox cannot be read."""
    return Problem("inbox", f"the inbox {inbox} {why_not_read(error)}; queued jobs still run")


class Inbox:
    """Scans the inbox, and remembers between scans since when each file is unchanged."""

    def __init__(
        self,
        root: Path,
        settle_seconds: float,
        now: Callable[[], float] = time.monotonic,
        *,
        prompted: bool = False,
    ) -> None:
        """Scan ``root``; ``now`` is a monotonic clock, ``prompted`` says whether the config has a prompt."""
        self.root = root
        self.prompted = prompted
        self.settle_seconds = settle_seconds
        self._now = now
        self._still_since: dict[str, tuple[Signature, float]] = {}
        # Settings files, see _settings.
        self._read: dict[str, tuple[Signature, dict[str, Any] | RequestError]] = {}
        self._records = Records(root)
        self._recipes: dict[str, tuple[Signature, dict[str, Any] | None]] = {}  # videos, see _embedded
        self._missed: dict[str, tuple[dict[str, Signature], str | None]] = {}  # see _missed_by
        self.held: dict[tuple[str, str], str] = {}  # groups that could not be taken, and why

    def scan(self, taken: Callable[[Collection[Name]], Mapping[Name, str]] = lambda _: {}) -> Scan:
        """Scan once; ``taken`` gives the ids of jobs that were taken earlier under some folders and NAMEs."""
        found, parts = look_through(self.root)
        moving = self._moving(found)
        self._read = {path: read for path, read in self._read.items() if path in found}
        self._recipes = {path: read for path, read in self._recipes.items() if path in found}
        self._missed = {path: missed for path, missed in self._missed.items() if path in found}
        all_defaults = defaults_by_folder(found)
        composed = {unicodedata.normalize("NFC", path) for path in found}
        ready: list[Group] = []
        missing: list[tuple[Group, str]] = []
        late: list[Group] = []  # without a picture: perhaps it was taken before they came
        unsettled = False
        records = self._records.among(found, moving)
        for whole in group_files(found, self._keyframes(found, moving), records):
            defaults = whole.defaults = defaults_above(whole.folder, all_defaults)
            if any(path in moving for path in (*whole.paths, *defaults)):
                unsettled = True
                continue
            for group in self._split(whole, found):
                group.signatures = {path: found[path].signature for path in (*group.paths, *defaults)}
                words = self._missing(group, found, composed, late)
                if words is None:
                    ready.append(group)
                else:
                    missing.append((group, words))
        missed = self._missed_by(late, taken)
        ready.sort(key=lambda group: max(found[path].arrived for path in group.paths))
        waiting = (_waiting(group, words + missed.get(id(group), ""), found) for group, words in missing)
        return Scan(tuple(ready), tuple(waiting), unsettled, parts)

    def _missed_by(
        self, late: list[Group], taken: Callable[[Collection[Name]], Mapping[Name, str]]
    ) -> dict[int, str]:
        """Give, by group, the remark that a job was taken before its files came.

        The database is asked once, and only about groups whose files are new.
        """
        known = self._missed
        new = [group for group in late if known.get(group.paths[0], ({}, None))[0] != group.signatures]
        jobs = taken({(group.folder, group.name) for group in new}) if new else {}
        known |= {group.paths[0]: (group.signatures, jobs.get((group.folder, group.name))) for group in new}
        missed = ((group, known[group.paths[0]][1]) for group in late)
        return {id(group): f" (job {job} was taken before this came)" for group, job in missed if job}

    def has_changed(self, group: Group, came: dict[str, list[Came]]) -> bool:
        """Say whether files that came since the last scan change a group that was ready.

        ``came`` caches them by folder, for as long as the caller keeps it. Only names are read: it is quick.
        """
        above = folders_above(group.folder)
        for folder in above:
            if folder not in came:
                came[folder] = self._came_to(folder)
        if any(is_defaults(path) for folder in above for path in _starting(came[folder], "_defaults.")):
            return True
        new = _starting(came[group.folder], group.name)
        if not new:
            return False
        settings = group.only("settings")
        records = {*group.files.get(ROLE, ()), *(path for path in new if suffix_of(path) == TYPE)}
        named = {settings: group.keyframes} if settings else {}
        together = group_files({*group.paths, *new}, named, records)
        alike = [other for other in together if other.name == group.name]
        paths = {path for other in alike for path in (*other.paths, *other.unread.values())}
        return not paths.isdisjoint(new) or not paths.issuperset(group.paths)

    def _came_to(self, folder: str) -> list[Came]:
        """List the files of a folder that the last scan did not see, sorted."""
        found = []
        with (
            contextlib.suppress(FileNotFoundError, NotADirectoryError),  # taking its files reports that
            folder_below(self.root, folder) as opened,
            os.scandir(opened) as entries,
        ):
            for entry in entries:
                path = f"{folder}/{entry.name}" if folder else entry.name
                new = path not in self._still_since and not IGNORED.search(entry.name)
                if new and not entry.is_dir(follow_symlinks=False):
                    found.append((unicodedata.normalize("NFC", entry.name), path))
        return sorted(found)

    def _moving(self, found: dict[str, Found]) -> set[str]:
        """Remember what has changed, and give the files that changed less than settle_seconds ago."""
        now = self._now()
        remembered = self._still_since
        self._still_since = {
            path: remembered[path]
            if path in remembered and remembered[path][0] == entry.signature
            else (entry.signature, now)
            for path, entry in found.items()
        }
        return {path for path, (_, since) in self._still_since.items() if now - since < self.settle_seconds}

    def _split(self, group: Group, found: dict[str, Found]) -> list[Group]:
        """Split a video that no job is to extend from the pictures of its NAME, which are a job alone."""
        if not group.files.get("video"):
            return [group]
        said = [self._settings(path, found) for path in (*group.files.get("settings", []), *group.defaults)]
        extends = any(isinstance(settings, RequestError) or "more" in settings for settings in said)
        if extends and group.files.get(ROLE):  # the draft itself is to become longer
            group.files["record"] = group.files.pop(ROLE)
        if extends or not (group.files.get("image") or group.frames):
            return [group]
        recipe = group.files.get(ROLE) or self._embedded(group.files["video"][0], found) is not None
        if len(group.files["video"]) == 1 and recipe:
            group.files["recipe"] = group.files.pop("video")
            return [group]
        video = Group(group.folder, group.name, defaults=group.defaults)
        video.files |= {role: group.files.pop(role) for role in OF_A_VIDEO if role in group.files}
        return [group, video]

    def _missing(
        self, group: Group, found: dict[str, Found], composed: Collection[str], late: list[Group]
    ) -> str | None:
        """Say what keeps a settled group from becoming a job; None if nothing does.

        ``composed``: all paths as NFC. A group without a picture is added to ``late``.
        """
        try:
            return (
                self.held.get((group.folder, group.name))
                or _in_the_way(group, found)
                or self._missing_partner(group, found, composed, late)
            )
        except Exception as error:  # no file may stop the others, whatever it does to us
            log.exception("%s: cannot be checked", as_utf8(group.name))
            return f"an error of framepackd's own ({type(error).__name__}: {error}): please report it"

    def _missing_partner(
        self, group: Group, found: dict[str, Found], composed: Collection[str], late: list[Group]
    ) -> str | None:
        own = group.only("settings")
        settings = self._settings(own, found) if own else {}
        extends = not isinstance(settings, RequestError) and "more" in settings
        missing = _missing_picture(group, extends=extends)
        if missing is not None:
            late.append(group)
            if group.unread:
                missing += f" is missing, and {why_unread(next(iter(group.unread.values())))}"
            return missing
        prompted = self.prompted or any(map(group.files.get, ("text", "record", ROLE)))
        for path in group.defaults:
            defaults = self._settings(path, found)
            if isinstance(defaults, RequestError):
                return str(defaults)  # one mistake there must not fail every job below
            prompted |= "prompt" in defaults
            extends |= "more" in defaults
        # With a mistake in its own settings a job is taken, and fails with the reason.
        prompted |= isinstance(settings, RequestError) or "prompt" in settings
        if recipe := group.only("recipe"):
            prompted |= "prompt" in (self._embedded(recipe, found) or {})
        if group.files.get("video") and not extends and not isinstance(settings, RequestError):
            return f"more = 3.0 in {group.name}.toml, to make {group.name}.mp4 longer by so many seconds"
        if not prompted:
            return f"{group.name}.txt"
        # Its picture is there; but an end frame of an unknown type must not be ignored silently.
        unread = next((path for role, path in group.unread.items() if role != "image"), None)
        return _missing_keyframe(group, composed) if unread is None else why_unread(unread)

    def _keyframes(self, found: dict[str, Found], moving: set[str]) -> dict[str, Mapping[int, str]]:
        """Give the pictures that settings files name as keyframes, by the paths of these files."""
        named: dict[str, Mapping[int, str]] = {}
        for path, entry in found.items():
            own = suffix_of(path) == ".toml" and not is_defaults(path) and not conflict_in(name_of(path))
            if own and path not in moving and entry.problem is None and as_utf8(path) == path:
                with contextlib.suppress(Exception):  # it is reported when the group is checked
                    settings = self._settings(path, found)
                    if not isinstance(settings, RequestError) and "keyframes" in settings:
                        named[path] = settings["keyframes"]
        return named

    def _embedded(self, path: str, found: dict[str, Found]) -> dict[str, Any] | None:
        """Read how a video was made, if framepackd made it; reads each version once."""
        signature = found[path].signature
        if path not in self._recipes or self._recipes[path][0] != signature:
            said = None
            if found[path].problem is None and as_utf8(path) == path:
                with contextlib.suppress(RequestError):  # then it is none
                    said = embedded.read(read_comment(self.root / path))
            self._recipes[path] = signature, said
        return self._recipes[path][1]

    def _settings(self, path: str, found: dict[str, Found]) -> dict[str, Any] | RequestError:
        """Read a settings file, or give what is wrong with it; reads each version once."""
        signature = found[path].signature
        if path not in self._read or self._read[path][0] != signature:
            try:
                with folder_below(self.root, folder_of(path)) as folder:
                    result: dict[str, Any] | RequestError = read_settings_file(folder / name_of(path), path)
            except RequestError as error:
                result = error
            except OSError as error:
                return RequestError(f"{path} cannot be read ({error.strerror}): correct its permissions")
            self._read[path] = signature, result
        return self._read[path][1]


def _starting(came: list[Came], start: str) -> list[str]:
    """Give the paths whose names start so, of a sorted list."""
    return [path for _, path in came[bisect_left(came, (start,)) : bisect_left(came, (start + LAST,))]]


def _in_the_way(group: Group, found: dict[str, Found]) -> str | None:
    """Say what a person has to put right first; None if nothing."""
    if conflict := _conflict(group):
        return conflict
    for path in (*group.paths, *group.defaults):
        for part in path.split("/"):
            if part != as_utf8(part):
                return f"{as_utf8(part)} has a name that is not UTF-8: rename it"
        name = name_of(path)
        # Either of the two forms may be the longer one.
        if max(len(form.encode()) for form in (name, unicodedata.normalize("NFC", name))) > MAX_NAME:
            return f"{name[:20]}… has a name of more than {MAX_NAME} bytes: rename it"
        if found[path].problem:
            return f"{name} {found[path].problem}"
    if group.files.get("unknown"):
        return why_unread(group.files["unknown"][0])
    for role in group.roles:
        several = group.files[role]
        if len(several) > 1:
            names = sorted(map(name_of, several))
            alike = len({unicodedata.normalize("NFC", name) for name in names}) < len(names)
            hint = " (the accents are written in two ways)" if alike else ""
            return f"only one of {' and '.join(names)} may stay{hint}"
    other = group.only("image") or group.only("end")
    if group.frames and other and not group.files.get("video"):
        return (
            f"{name_of(other)} and the chain {group.name}_frame_N are in each other's way: only one may stay"
        )
    empty = [path for path in group.paths if is_picture(path) and found[path].signature.size == 0]
    return f"{name_of(empty[0])} is empty (0 bytes)" if empty else None


def _conflict(group: Group) -> str | None:
    """Report a conflict copy, unless the settings name it as a keyframe."""
    for role in group.roles:
        for name in map(name_of, group.files[role] if not role.startswith("keyframe") else ()):
            if copy := conflict_in(name):
                return (
                    f"{as_utf8(name)} is a conflict copy of {as_utf8(copy.original)} ({copy.program}): "
                    "delete it, or rename it to have it made"
                )
    return None


def _missing_picture(group: Group, *, extends: bool = False) -> str | None:
    """Name the file that a group needs first: its picture, the next frame of its chain, or a video."""
    if group.files.get("video") or extends:
        return None if group.files.get("video") else f"{group.name}{VIDEO}"
    if not group.frames:
        return None if group.files.get("image") else f"{group.name}.png"
    following = next(number for number in itertools.count() if f"frame-{number}" not in group.frames)
    if following == len(group.frames) > 1:
        return None
    suffix = PurePosixPath(group.files[group.frames[0]][0]).suffix
    return f"{group.name}_frame_{following}{suffix}"


def _missing_keyframe(group: Group, composed: Collection[str]) -> str | None:
    """Report a keyframe that the group's settings name and that is missing, or belongs to another group.

    ``composed``: all paths in the inbox as NFC.
    """
    for number, file in group.keyframes.items():
        if is_picture(file) and not group.files.get(f"keyframe-{number}"):
            path = unicodedata.normalize("NFC", f"{group.folder}/{file}".lstrip("/"))
            if path not in composed:
                return file
            return f"{file} is used already: give keyframe {number} of {group.name} a picture of its own"
    return None


def _waiting(group: Group, missing: str, found: dict[str, Found]) -> Waiting:
    since = max(found[path].arrived for path in group.paths)
    return Waiting(
        folder=as_utf8(group.folder),
        name=as_utf8(group.name),
        files=tuple(as_utf8(name_of(path)) for path in group.paths),
        missing=missing,
        since=datetime.fromtimestamp(since, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    )
