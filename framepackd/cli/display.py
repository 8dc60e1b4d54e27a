"""Draws status and the models in a terminal."""

import sys
from collections.abc import Iterator, Sized
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TypedDict

import click
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text

from framepackd.jobs.report import (
    DaemonReport,
    DeliveryReport,
    JobReport,
    ProblemReport,
    Report,
    WaitingReport,
    running_in,
)
from framepackd.text import clock, duration, path_of, percent, printable, size_text

PIPED_WIDTH = 240  # columns; what reads a pipe needs whole lines
NARROW = 110  # columns; in fewer, names and reasons do not fit beside each other
LABEL_WIDTH = 11
SHOWN_QUEUE, SHOWN_RESULTS, SHOWN_WAITING, SHOWN_FAILURES, SHOWN_PROBLEMS = 10, 8, 10, 10, 10
DOTS = {"running": "green", "stopping": "yellow", "stopped": "dim", "died": "red"}
STATE_STYLES = {
    "done": "green",
    "failed": "red",
    "cancelled": "yellow",
    "skipped": "dim",
    "suspect": "yellow",
}


def console() -> Console:
    """Give a console for standard output; plain where it is not a terminal or NO_COLOR is set."""
    terminal = sys.stdout.isatty()
    return Console(highlight=False, width=None if terminal else PIPED_WIDTH)


def show(*parts: RenderableType, soft_wrap: bool = False) -> None:
    """Print to standard output; a pipe gets no blanks at the ends of lines."""
    screen = console()
    if screen.is_terminal:
        screen.print(*parts, sep="\n", soft_wrap=soft_wrap)
        return
    with screen.capture() as captured:
        screen.print(*parts, sep="\n", soft_wrap=soft_wrap)
    for line in captured.get().splitlines():
        click.echo(line.rstrip())


def status(report: Report, now: datetime | None = None) -> RenderableType:
    """Draw what ``status --json`` holds, for a person."""
    now = now or datetime.now(UTC)
    jobs = report["jobs"]
    moving = [job for job in jobs if job["delivery"]]
    queued = [job for job in jobs if job["state"] == "queued" and not job["delivery"]]
    ended = [job for job in jobs if job["state"] not in ("running", "queued")]
    parts: list[RenderableType] = [_Headline(report, now), *_devices(report["daemon"])]
    if report["daemon"]["paused"] is not None:
        parts.append(_line("  paused", report["daemon"]["paused"], "bold yellow", "bold"))
    if problems := report["problems"]:
        shown = _Entries("  problem", "bold red")
        for problem in problems[:SHOWN_PROBLEMS]:
            shown.add([], problem["text"])
        parts.append(shown.and_more(problems, SHOWN_PROBLEMS))
    if running := running_in(report):
        parts.append(_Running([_now(job, now) for job in running]))
    if queued:
        parts.append(_queue(queued, report, now))
    if moving:
        parts.append(_moving(moving, report["problems"], now))
    if report["waiting"]:
        parts.append(_waiting(report["waiting"], now))
    if failures := [job for job in ended if job.get("open")]:
        parts.append(_results(failures, now, SHOWN_FAILURES))
    if results := [job for job in ended if not job.get("open")]:
        parts.append(_results(results, now, SHOWN_RESULTS))
    if not jobs and not report["waiting"] and not report["problems"]:
        parts.append(_nothing_to_do(report["daemon"]))
    return Group(*parts)


def _devices(daemon: DaemonReport) -> list[RenderableType]:
    """Name the device; of several each, and what keeps one of them from its next job."""
    devices = daemon.get("devices", [])
    if len(devices) < 2:
        hardware = daemon.get("hardware")
        return [_line("  device", hardware, "dim", "dim")] if hardware else []
    lines = [": ".join(filter(None, (device["name"], device["card"]))) for device in devices]
    held = [device["held"] if daemon["paused"] is None else None for device in devices]
    return [
        _line("  device", f"{line}{f' waits: {why}' if why else ''}", "dim", "dim")
        for line, why in zip(lines, held, strict=True)
    ]


def _nothing_to_do(daemon: DaemonReport) -> RenderableType:
    grid = _grid()
    inbox = daemon.get("inbox", "the inbox")  # a daemon from before an update does not say it
    grid.add_row(Text("  nothing to do", style="dim"), Text("drop NAME.png and NAME.txt into the inbox"))
    grid.add_row(Text("  inbox", style="dim"), Text(printable(inbox), overflow="fold"))
    grid.add_row(Text("  outbox", style="dim"), Text(printable(daemon.get("outbox", "")), overflow="fold"))
    return grid


@dataclass(frozen=True)
class _Headline:
    """What the daemon does, and the counts, which go below it where both do not fit on a line."""

    report: Report
    now: datetime

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        daemon, counts = self.report["daemon"], self.report["counts"]
        dot = DOTS[daemon["state"]] if daemon["paused"] is None else "yellow"
        words = Text.assemble(("● ", dot), ("framepackd ", "bold"), _daemon_words(daemon, self.now))
        numbers = Text(" · ".join(f"{counts[state]} {state}" for state in counts if counts[state]), "dim")
        if numbers and len(words) + 3 + len(numbers) > options.max_width:
            yield words
            yield Text("  ") + numbers
        else:
            yield words + Text("   " if numbers else "") + numbers


def _line(label: str, words: str, label_style: str, style: str) -> RenderableType:
    grid = _grid()
    grid.add_row(Text(label, style=label_style), Text(printable(words), style=style))
    return grid


def _daemon_words(daemon: DaemonReport, now: datetime) -> str:
    if daemon["state"] == "stopped":
        return "is not running: start it with framepackd run"
    if daemon["state"] == "died":
        return "died and left work behind: start it with framepackd run, it goes on"
    return f"{daemon['state']} for {_since(daemon['since'], now)}  pid {daemon['pid']}"


def _now(job: JobReport, now: datetime) -> "_Now":
    at_end = Text(job["note"], style="yellow") if job["note"] else Text(_finish(job, now), style="cyan")
    where = Text("  ".join(job.get("stage") or ()))
    return _Now(Text(_path(job), style="bold"), job.get("progress") or 0.0, where, at_end)


@dataclass(frozen=True)
class _Now:
    """A running job."""

    path: Text
    progress: float  # 0 to 1
    where: Text
    at_end: Text


@dataclass(frozen=True)
class _Running:
    """The running jobs: each on one line, or on two in a narrow terminal."""

    jobs: list[_Now]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        narrow = options.max_width < NARROW
        grid = _grid()
        for number, job in enumerate(self.jobs):
            label = Text("" if number else "  now", style="cyan")
            share = Text(f"{percent(job.progress):3} %")
            texts = [text for text in (share, job.where, job.at_end) if text.plain]
            for text in texts:
                text.no_wrap = True
            bar = ProgressBar(total=1, completed=job.progress, width=10 if narrow else 30)
            if narrow:
                below = Table.grid(padding=(0, 2))
                below.add_row(bar, *texts)
                grid.add_row(label, job.path)
                grid.add_row("", below)
            else:
                job.path.no_wrap, job.path.overflow = True, "ellipsis"
                grid.add_row(label, job.path, bar, *texts)
        yield grid


class _Entries:
    """Rows of one kind: facts in columns, then a note, which goes below them in a narrow terminal."""

    def __init__(self, label: str, style: str) -> None:
        """Take the label of the first row."""
        self._label = Text(label, style=style)
        self._rows: list[tuple[Text, list[str], Text]] = []

    def add(self, facts: list[str], note: object = "", *, style: str = "", label: Text | None = None) -> None:
        """Add a row; its texts are made safe to print."""
        first = label if label is not None else Text() if self._rows else self._label
        self._rows.append((first, facts, Text(printable(str(note)), style=style)))

    def and_more(self, all_of_them: Sized, shown: int) -> "_Entries":
        """Add a row that says how many are not shown."""
        if len(all_of_them) > shown:
            self.add([f"and {len(all_of_them) - shown} more"], label=Text())
        return self

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        grid = _grid()
        wide = options.max_width >= NARROW
        columns = max(len(facts) for _, facts, _ in self._rows)
        for label, facts, note in self._rows:
            if wide:
                padded = [*facts, *[""] * (columns - len(facts))]
                grid.add_row(label, *map(_text, padded), note)
                continue
            line = Text("  ".join(filter(None, map(printable, facts))), overflow="fold")
            note.overflow = "fold"
            if not line or not note or len(line) + 2 + len(note) <= options.max_width - LABEL_WIDTH - 2:
                grid.add_row(label, line + Text("  " if line and note else "") + note)
            else:
                grid.add_row(label, line)
                grid.add_row("", note)
        yield grid


def _queue(queued: list[JobReport], report: Report, now: datetime) -> RenderableType:
    shown = _Entries("  queue", "blue")
    for job in queued[:SHOWN_QUEUE]:
        eta = "" if job["eta_seconds"] is None else f"about {duration(job['eta_seconds'])}"
        frames = f"{job['frames']} frames" + (f" ({job['clips']} clips)" if job["clips"] > 1 else "")
        shown.add([_path(job), frames, eta], job["note"] or "", style="yellow")
    shown.and_more(queued, SHOWN_QUEUE)
    if report["eta_seconds"] is not None:
        shown.add([f"all done {_finish(report, now)}"], label=Text())
    return shown


def _moving(jobs: list[JobReport], problems: list[ProblemReport], now: datetime) -> RenderableType:
    stuck = any(job["delivery"] and job["delivery"]["reason"] for job in jobs)
    shown = _Entries("  moving", "red" if stuck else "blue")
    reported = " ".join(problem["text"] for problem in problems)
    for job in jobs[:SHOWN_QUEUE]:
        delivery, note = job["delivery"], job["note"]
        assert delivery is not None
        if delivery["reason"] and delivery["reason"] in reported:
            note = "its files cannot be moved: see problem"  # which says why, and what to do
        shown.add(
            [_path(job), f"to be {delivery['state']}", _again(delivery, now)], note or "", style="yellow"
        )
    return shown.and_more(jobs, SHOWN_QUEUE)


def _waiting(waiting: list[WaitingReport], now: datetime) -> RenderableType:
    shown = _Entries("  waiting", "yellow")
    for entry in waiting[:SHOWN_WAITING]:
        files = path_of(entry["folder"], ", ".join(entry["files"]))
        note = entry.get("note", entry["missing"])
        shown.add([files, f"for {_since(entry['since'], now)}"], note)
    return shown.and_more(waiting, SHOWN_WAITING)


def _results(ended: list[JobReport], now: datetime, most: int) -> RenderableType:
    shown = _Entries("", "")
    for job in ended[:most]:
        state = "suspect" if job["state"] == "done" and job["quality"] else job["state"]
        shown.add(
            [_path(job), f"{_since(job['finished_at'], now)} ago"],
            ": ".join(filter(None, (job["quality"], job["error"] or job["output"]))),
            label=Text(f"  {state}", style=STATE_STYLES[state]),
        )
    return shown.and_more(ended, most)


def _grid() -> Table:
    """Give a table without lines; its first column is equally wide in all parts of the picture."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(min_width=LABEL_WIDTH)
    return grid


def _path(job: JobReport) -> str:
    draft = " (draft)" if job.get("draft") else ""  # a daemon from before an update does not say it
    return printable(path_of(job["folder"], job["name"])) + draft


def _text(value: object) -> str:
    """Make a value safe to print, as it is."""
    return escape(printable(str(value)))


def _since(when: str | None, now: datetime) -> str:
    """Say how long ago something was; empty where the time is not known."""
    return "" if when is None else duration((now - datetime.fromisoformat(when)).total_seconds())


def _again(delivery: DeliveryReport, now: datetime) -> str:
    when = delivery["next_try"]
    return f"tried again at {clock(when, now, seconds=True)}" if when else ""


def _finish(of: JobReport | Report, now: datetime) -> str:
    """Say when a job, or the queue, is done: how long from now, and the time on the clock."""
    if of["eta_seconds"] is None:
        return ""
    when = of.get("finishes_at")
    return f"in {duration(of['eta_seconds'])}" + (f", at {clock(when, now)}" if when else "")


class SourceRow(TypedDict):
    """What is here of one source of a model; sizes are in bytes."""

    role: str
    source: str
    folder: str
    bytes_here: int
    bytes_to_fetch: int | None  # None: unknown
    missing: list[str]


class ModelRow(TypedDict):
    """One model of ``models list --json``."""

    name: str
    kind: str
    default: bool
    complete: bool
    sources: list[SourceRow]
    error: str | None


def models(rows: list[ModelRow]) -> RenderableType:
    """Draw what ``models list --json`` holds: each model and its sources; the config's own has a star."""
    parts: list[RenderableType] = []
    for row in rows:
        name = Text(row["name"] + (" *" if row["default"] else ""), "bold")
        parts.append(Text.assemble(name, "  ", (row["kind"], "dim"), *_whole_model(row)))
        grid = Table.grid(Column(), Column(overflow="fold"), Column(no_wrap=True), padding=(0, 2))
        for source in row["sources"]:
            repository, _, revision = source["source"].partition("@")
            short = f"{repository}@{revision[:8]}" if revision else repository
            lacking = len(source["missing"])
            unfit = row["complete"] and source["folder"] in (row["error"] or "")
            files = Text("unfit: see below", "red") if unfit else Text("complete", "green")
            grid.add_row("", _text(short), Text(f"{lacking} missing", "yellow") if lacking else files)
        parts += [grid] if row["sources"] else []
    return Group(*parts)


def _whole_model(row: ModelRow) -> Iterator[tuple[str, str]]:
    """Say how much of a model is here, and how much is to be fetched."""
    if not row["sources"]:
        yield "  unknown: see below", "red"
        return
    yield f"  {size_text(sum(source['bytes_here'] for source in row['sources']))} here", "dim"
    if not row["complete"]:
        sizes = [source["bytes_to_fetch"] for source in row["sources"] if source["missing"]]
        known = None if None in sizes else sum(size or 0 for size in sizes)
        yield f", {size_text(known)} to fetch", "yellow"
