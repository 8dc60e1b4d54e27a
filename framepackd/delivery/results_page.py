"""Writes the results page: ``index.html`` in the outbox, with pictures and videos.

The page is static: it works from the disk, from a copy of the folder and behind any web server, without a
script or the network. A thread writes it that the loop never waits for; no job depends on it.
"""

import contextlib
import logging
import os
import re
import threading
import time
from collections.abc import Callable
from datetime import datetime
from functools import cache
from importlib import resources
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from framepackd import files, rights
from framepackd.delivery.results import FOLDER, Outbox, Result, ResultRecord, failures
from framepackd.settings.config import Config
from framepackd.text import JOB_ID, as_utf8, duration, printable

log = logging.getLogger(__name__)

INDEX = "index.html"
MARK = "<!-- made by framepackd; an index.html without this line is left alone -->"
MARKED_BYTES = 200  # the mark is within these
# A full page never changes when results are added; the index has the newest, this many or more.
PAGE_RESULTS = 100
PAGE = re.compile(r"page-(?P<number>[1-9][0-9]{0,8})\.html")
SHOWN_FAILURES = 20
SHOWN_FOLDERS = 30  # to choose from; a page with more has no choice
ORPHAN_SECONDS = 86400  # a filmstrip may be there before its video
PAUSE_SECONDS = 2.0  # before a page is written: the next job starts first, and a burst of results shares one
CLOSE_SECONDS = 10.0  # for the last page, when the daemon ends

# The page fetches nothing from elsewhere and runs nothing, whatever a name or a prompt holds.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src 'self' file:; media-src 'self' file:"


class ResultsPage:
    """Keeps the page up to date with the outbox, in its own thread."""

    def __init__(self, trouble: Callable[[], str | None] = lambda: None) -> None:
        """Write nothing yet, and nothing while ``trouble`` says that the outbox cannot be used."""
        self._look_for_trouble = trouble
        self._outbox = Outbox()
        self._drawn: dict[Path, Any] = {}  # what the older pages show
        self._due: Config | None = None
        self._closing = False
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._trouble: str | None = None  # the last one that was logged

    def refresh(self, config: Config) -> None:
        """Have the page updated, if the config wants one; returns at once."""
        if not config.results_page:
            return
        with self._changed:
            self._due = config
            self._changed.notify()
        if self._thread is None:  # a daemon thread, since an outbox that hangs must not keep us from ending
            self._thread = threading.Thread(target=self._go_on, name="results-page", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Write a page that is due, but wait at most CLOSE_SECONDS for it."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(CLOSE_SECONDS)

    def _go_on(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._due is not None or self._closing)
                self._changed.wait_for(lambda: self._closing, PAUSE_SECONDS)
                config, self._due = self._due, None
            if config is None:
                return
            try:
                trouble = self._look_for_trouble() or self.update(config.outbox, config.failed)
            except Exception as error:  # no error here may matter to a job
                trouble = f"{type(error).__name__}: {error}"
            if trouble is not None and trouble != self._trouble:
                log.warning("the results page cannot be written: %s", trouble)
            self._trouble = trouble

    def update(self, outbox: Path, failed: Path) -> str | None:
        """Write the page and the older ones that it links to, where they have changed.

        Says what prevents it, if something does. There is no page before there is something to show.

        Raises:
            OSError: a folder cannot be read or written.
        """
        index = outbox / INDEX
        if os.path.lexists(index) and not is_ours(index):
            return f"{index} is not framepackd's: move it away, or set results_page = false"
        results = self._outbox.results(outbox)
        shown, failed_count = failures(failed, SHOWN_FAILURES)
        if not results and not failed_count and not index.exists():
            return None
        older = max(len(results) // PAGE_RESULTS - 1, 0)
        if older:
            files.make_folder(outbox / FOLDER)
        for number in range(1, older + 1):
            page = results[PAGE_RESULTS * (number - 1) : PAGE_RESULTS * number]
            self._write_older(outbox / FOLDER / _name(number), page, number, older)
        counts = f"{len(results)} video{'' if len(results) == 1 else 's'}"
        newest = _draw(
            f"{counts}, newest first",
            results[PAGE_RESULTS * older :],
            failures=shown,
            failed=failed_count,
            links={"older": f"{FOLDER}/{_name(older)}"} if older else {},
        )
        _replace(index, newest)
        _clear(outbox / FOLDER, {result.record.id for result in results}, older)
        return None

    def _write_older(self, path: Path, results: list[Result], number: int, older: int) -> None:
        links = {"newer": f"../{INDEX}" if number == older else _name(number + 1)}
        if number > 1:
            links["older"] = _name(number - 1)
        drawn = (links, [(result.path, result.record.id, result.strip, result.inputs) for result in results])
        if self._drawn.get(path) != drawn or not path.exists():  # to draw ten thousand takes a second
            _replace(path, _draw(f"page {number}", results, up="../", links=links))
            self._drawn[path] = drawn


def is_page(path: str) -> bool:
    """Say whether a path below the outbox is where a page of ours may be."""
    folder, _, name = path.rpartition("/")
    return path == INDEX or (folder == FOLDER and PAGE.fullmatch(name) is not None)


def is_ours(index: Path) -> bool:
    """Say whether a page was written by framepackd."""
    try:
        with files.open_regular(index) as file:
            return MARK.encode() in file.read(MARKED_BYTES)
    except OSError:
        return False


def _name(number: int) -> str:
    return f"page-{number}.html"


def _replace(path: Path, text: str) -> None:
    """Write a page, unless it is unchanged."""
    content = text.encode("utf-8", "replace")
    with contextlib.suppress(OSError):
        if path.read_bytes() == content:
            rights.share(path)
            return
    try:
        files.write_bytes(path, content)
        rights.share(path)
    except OSError:
        with contextlib.suppress(OSError):
            files.hidden_part(path).unlink(missing_ok=True)
        raise


def _clear(folder: Path, shown: set[str], older: int) -> None:
    """Remove the filmstrips of videos that are gone, and pages that are not needed any more."""
    if folder.is_symlink():
        return  # it may lead to the filmstrips of another outbox
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_file(follow_symlinks=False) and _is_gone(Path(entry), shown, older):
                Path(entry).unlink(missing_ok=True)


def _is_gone(path: Path, shown: set[str], older: int) -> bool:
    """Say whether a file of ours belongs to nothing any more."""
    if path.suffix == ".jpg":
        orphan = JOB_ID.fullmatch(path.stem) and path.stem not in shown
        return bool(orphan) and time.time() - path.lstat().st_mtime > ORPHAN_SECONDS
    page = PAGE.fullmatch(path.name)
    return page is not None and int(page["number"]) > older and is_ours(path)


def _draw(subtitle: str, results: list[Result], *, up: str = "", **shown: Any) -> str:
    """Fill the template; ``up`` is the path from the page to the outbox."""
    common = {"title": "Results", "mark": Markup(MARK), "policy": Markup(POLICY)}  # noqa: S704 - our own
    folders = sorted({result.folder for result in results})
    by_folder = folders if 1 < len(folders) <= SHOWN_FOLDERS else []
    days = [(day, list(each)) for day, each in groupby(reversed(results), _day)]
    return _template().render(common, subtitle=subtitle, days=days, folders=by_folder, up=up, **shown)


@cache
def _template() -> Template:
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"shown": _shown, "local": _local, "facts": _facts}
    template = resources.files("framepackd").joinpath("results_page.html")
    return environment.from_string(template.read_text("utf-8"))


def _shown(text: str) -> str:
    """Escape control characters, also those that turn the direction of text."""
    return "\n".join(printable(as_utf8(line)) for line in text.split("\n"))


def _facts(record: ResultRecord) -> list[str]:
    facts = ["draft"] if record.draft else []
    facts += [f"{record.width}×{record.height}", f"{record.frames / record.fps:.1f} s"]
    if record.seed is not None:
        facts.append(f"seed {record.seed}")
    facts += filter(None, [_shown(record.model), f"{record.steps} steps" if record.steps else ""])
    if record.timings:
        on = f" on {_shown(record.device)}" if record.device else ""
        facts.append(f"made in {duration(sum(record.timings.values()))}{on}")
    return facts


def _day(result: Result) -> str:
    at = result.record.finished_at.astimezone()
    return f"{at:%A}, {at.day} {at:%B %Y}"


def _local(moment: datetime) -> str:
    return f"{moment.astimezone():%Y-%m-%d %H:%M}"
