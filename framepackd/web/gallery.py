"""Finds the results that the page shows: what lies in the outbox now, the newest first."""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from pathlib import Path
from urllib.parse import unquote_to_bytes

from framepackd.delivery.results import PICTURE, Outbox, Result

FRESH_SECONDS = 2.0  # the outbox is not looked through more often
PAGE = 60  # results that are loaded at once


@dataclass(frozen=True)
class Shown:
    """A result as the page shows it."""

    result: Result

    @property
    def id(self) -> str:
        """Its job."""
        return self.result.record.id

    @property
    def prompt(self) -> str:
        """Its sentence; its name where it has none."""
        return self.result.record.prompt or self.result.record.name

    @property
    def ratio(self) -> float:
        """Width by height."""
        return round(self.result.record.width / self.result.record.height, 3)

    @property
    def seconds(self) -> float:
        """Its length."""
        return self.result.record.frames / self.result.record.fps

    @property
    def folder(self) -> str:
        """The folder below the outbox."""
        return self.result.path.rpartition("/")[0]

    @property
    def day(self) -> date:
        """The day on which it was finished, here."""
        return self.result.record.finished_at.astimezone().date()

    @property
    def picture(self) -> str | None:
        """The path below the outbox of its picture; else of its strip."""
        link = self.result.picture or self.result.strip
        return unquote_to_bytes(link).decode("utf-8", "surrogateescape") if link else None

    def file(self, name: str) -> str | None:
        """Give the path of one of its files by what the page calls it; None if there is none."""
        fixed = {"video.mp4": ".mp4", "record.json": ".json"}
        if name in fixed:
            return self.result.path + fixed[name]
        if name == "strip.jpg" and self.result.strip:
            return self.result.strip
        return next((path for path in self.result.inputs if Path(path).name == name), None)

    def owns(self, path: str) -> bool:
        """Say whether a file below the outbox is one of its files."""
        video = self.result.path
        return path in (f"{video}.mp4", f"{video}.json", self.result.strip, *self.result.inputs)

    @cached_property
    def pictures(self) -> list[str]:
        """The names of the pictures that it was made from."""
        roles = zip(self.result.links, self.result.inputs, strict=True)
        return [Path(path).name for (role, _), path in roles if role == PICTURE]


class Gallery:
    """Knows the results; threads may share it."""

    def __init__(self, outbox: Path) -> None:
        """Know of nothing yet."""
        self._root = outbox
        self._outbox = Outbox()
        self._lock = threading.Lock()
        self._at = float("-inf")
        self._all: list[Shown] = []
        self._by_id: dict[str, Shown] = {}

    def all(self) -> list[Shown]:
        """Give all results, the newest first; none while the outbox cannot be read."""
        with self._lock:
            if time.monotonic() - self._at > FRESH_SECONDS:
                try:
                    found = self._outbox.results(self._root)
                except OSError:
                    found = []
                self._all = [Shown(result) for result in reversed(found)]
                self._by_id = {shown.id: shown for shown in reversed(self._all)}
                self._at = time.monotonic()
            return self._all

    def newest(self, count: int) -> list[Shown]:
        """Give the results that were finished last."""
        return self.all()[:count]

    def find(self, job: str) -> Shown | None:
        """Give a result by its job."""
        self.all()
        return self._by_id.get(job)

    def forget(self) -> None:
        """Look again next time: something was moved."""
        with self._lock:
            self._at = float("-inf")


@dataclass(frozen=True)
class Wanted:
    """Which results are asked for."""

    words: str = ""
    folder: str | None = None
    model: str | None = None
    day: str | None = None
    odd: bool = False
    draft: bool = False

    def chosen(self, results: Sequence[Shown]) -> list[Shown]:
        """Give those that fit: each word must be in the sentence, the name or the folder."""
        words = self.words.casefold().split()
        return [shown for shown in results if self._fits(shown, words)]

    def _fits(self, shown: Shown, words: list[str]) -> bool:
        record = shown.result.record
        text = f"{record.prompt} {shown.result.path}".casefold()
        return (
            all(word in text for word in words)
            and (self.folder is None or shown.folder == self.folder)
            and (self.model is None or record.model == self.model)
            and (self.day is None or shown.day.isoformat() == self.day)
            and (not self.odd or bool(record.quality))
            and (not self.draft or record.draft)
        )
