"""Finds the records of drafts among the files of the inbox: dropped again, they ask for the finals."""

from collections.abc import Collection, Mapping
from pathlib import Path

from framepackd.files import folder_below
from framepackd.inbox.listing import Found, Signature
from framepackd.inbox.naming import folder_of, name_of, suffix_of
from framepackd.jobs import drafts
from framepackd.text import as_utf8

TYPE = ".json"


class Records:
    """Reads each version of a JSON file once."""

    def __init__(self, root: Path) -> None:
        """Look below ``root``."""
        self._root = root
        self._read: dict[str, tuple[Signature, bool]] = {}

    def among(self, found: Mapping[str, Found], moving: Collection[str]) -> set[str]:
        """Give the paths of records; one that still changes counts too, so that its job waits for it."""
        candidates = [path for path in found if suffix_of(path) == TYPE]
        self._read = {path: self._version(path, found[path]) for path in candidates if path not in moving}
        return {path for path in candidates if path in moving or self._read[path][1]}

    def _version(self, path: str, found: Found) -> tuple[Signature, bool]:
        known = self._read.get(path)
        if known is not None and known[0] == found.signature:
            return known
        usable = found.problem is None and as_utf8(path) == path
        return found.signature, usable and self._is_record(path)

    def _is_record(self, path: str) -> bool:
        """Say whether a file is a record whose final can be made of files that are dropped."""
        try:
            with folder_below(self._root, folder_of(path)) as folder:
                draft = drafts.read(folder / name_of(path))
        except OSError:  # gone meanwhile, or not for us
            return False
        return draft is not None and "more" not in draft.settings
