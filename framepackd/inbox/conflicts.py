"""Recognizes the conflict copies of programs that synchronize folders.

The formats are from the programs' documentation or source.
"""

import re
import unicodedata
from typing import NamedTuple

_DATE = r"[0-9]{4}-[0-9]{2}-[0-9]{2}"
_MARKS = {
    # " (conflicted copy 2026-11-28 101112)", also with a user's name; since client 2.5
    "Nextcloud or ownCloud": rf" \((?:conflicted copy (?:[^()]+ )?|case clash from ){_DATE} [0-9]{{6}}\)",
    # "_conflict-20261128-101112", "_conflict_ann-20261128-101112"; before client 2.5
    "ownCloud": r"_conflict(?:_.+)?-[0-9]{8}-[0-9]{6}",
    # ".sync-conflict-20261128-101112-ABCDEFG", before 0.14.41 without the device
    "Syncthing": r"\.sync-conflict-[0-9]{8}-[0-9]{6}(?:-[A-Z0-9]{7})?",
    # " (Ann's conflicted copy 2026-11-28)", " (In Konflikt stehende Kopie von Ann 2026-11-28)", numbered if
    # there are several; " (Case Conflict)", " (Unicode Encoding Conflict 1)"
    "Dropbox": rf" \((?:[^()]+ )?(?i:conflicted copy|in Konflikt stehende Kopie)(?: [^()]+)? {_DATE}"
    r"(?: \(?[0-9]+\)?)?\)"
    r"| \((?i:case|unicode encoding|white ?space|selective sync) (?i:conflict)(?: \(?[0-9]+\)?)?\)",
    # " (SFConflict ann@example.org 2026-11-28-10-11-12)"
    "Seafile": rf" \(SFConflict (?:[^()]+ )?{_DATE}-[0-9]{{2}}-[0-9]{{2}}-[0-9]{{2}}\)",
    # "_Ann-PC_Nov-28-1011-2026_CaseConflict_1"
    "Synology Drive": r"_[^_]+_[A-Z][a-z]{2}-[0-9]{2}-[0-9]{4,6}-[0-9]{4}_[A-Za-z]*Conflict(?:_[0-9]+)?",
}
_COPIES = {
    program: re.compile(rf"(?P<stem>.+?)(?:{mark})(?P<suffix>\.[^.]+)?", re.DOTALL)
    for program, mark in _MARKS.items()
}


class Conflict(NamedTuple):
    """What the name of a conflict copy means."""

    original: str  # the name of the file that it is a copy of
    program: str


def conflict_in(name: str) -> Conflict | None:
    """Recognize a conflict copy by its file name.

    >>> conflict_in("cat.sync-conflict-20261128-101112-ABCDEFG.png")
    Conflict(original='cat.png', program='Syncthing')
    """
    if "onfli" not in name and "case clash from" not in name:  # quick: there may be thousands
        return None
    composed = unicodedata.normalize("NFC", name)
    for program, pattern in _COPIES.items():
        if found := pattern.fullmatch(composed):
            return Conflict(found["stem"] + (found["suffix"] or ""), program)
    return None
