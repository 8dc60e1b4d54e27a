"""How status, one job and the checks look in a terminal."""

import sys
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text

from framepack_core.footprint import GIB
from framepackd import loras
from framepackd.names import printable, size_text
from framepackd.stage import stage

if TYPE_CHECKING:
    from framepackd.check import Check, Forecast

PIPED_WIDTH = 240  # who reads a pipe looks for whole lines
LABEL_WIDTH = 11
SHOWN_QUEUE, SHOWN_RESULTS, SHOWN_WAITING, SHOWN_PROBLEMS = 10, 8, 10, 10
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


def status(report: dict[str, Any], now: datetime | None = None) -> RenderableType:
    """Draw what ``status --json`` holds, for a person."""
    now = now or datetime.now(UTC)
    jobs = report["jobs"]
    moving = [job for job in jobs if job["delivery"]]
    running = [job for job in jobs if job["state"] == "running" and not job["delivery"]]
    queued = [job for job in jobs if job["state"] == "queued" and not job["delivery"]]
    ended = [job for job in jobs if job["state"] not in ("running", "queued")]
    parts: list[RenderableType] = [_headline(report, now)]
    if report["daemon"]["paused"] is not None:
        parts.append(_paused(report["daemon"]["paused"]))
    if report["problems"]:
        parts.append(_problems(report["problems"]))
    parts += [_running(job, now) for job in running]
    if queued:
        parts.append(_queue(queued, report, now))
    if moving:
        parts.append(_moving(moving))
    if report["waiting"]:
        parts.append(_waiting(report["waiting"], now))
    if ended:
        parts.append(_results(ended, now))
    if not jobs and not report["waiting"] and not report["problems"]:
        parts.append(Text("  nothing to do: drop NAME.png and NAME.txt into the inbox", style="dim"))
    return Group(*parts)


def _headline(report: dict[str, Any], now: datetime) -> Text:
    daemon = report["daemon"]
    dot = DOTS[daemon["state"]] if daemon["paused"] is None else "yellow"
    line = Text.assemble(("● ", dot), ("framepackd ", "bold"), _daemon_words(daemon, now))
    counts = report["counts"]
    numbers = [f"{counts[state]} {state}" for state in counts if counts[state]]
    if numbers:
        line.append("   " + " · ".join(numbers), style="dim")
    return line


def _paused(why: str) -> RenderableType:
    grid = _grid()
    grid.add_row(Text("  paused", style="bold yellow"), Text(printable(why), style="bold"))
    return grid


def _problems(problems: list[dict[str, Any]]) -> RenderableType:
    grid = _grid()
    for position, problem in enumerate(problems[:SHOWN_PROBLEMS]):
        grid.add_row(Text("  problem" if position == 0 else "", style="bold red"), _text(problem["text"]))
    if len(problems) > SHOWN_PROBLEMS:
        grid.add_row("", f"and {len(problems) - SHOWN_PROBLEMS} more")
    return grid


def _daemon_words(daemon: dict[str, Any], now: datetime) -> str:
    if daemon["state"] == "stopped":
        return "is not running: start it with framepackd run"
    if daemon["state"] == "died":
        return "died and left work behind: start it with framepackd run, it goes on"
    since = now - datetime.fromisoformat(daemon["since"])
    return f"{daemon['state']} for {duration(since.total_seconds())}  pid {daemon['pid']}"


def _running(job: dict[str, Any], now: datetime) -> RenderableType:
    total = max(job["sections"] * job["steps"], 1)
    done = max(job["section"] - 1, 0) * job["steps"] + job["step"]
    grid = _grid()
    at_end = (
        Text(job["note"], style="yellow")
        if job["note"]
        else Text(_finish(job["eta_seconds"], now), style="cyan")
    )
    at_end.no_wrap = True
    where = "  ".join(stage(job)) if job["section"] else "loading the model"
    grid.add_row(
        Text("  now", style="cyan"),
        Text(_path(job), style="bold", overflow="ellipsis", no_wrap=True),
        ProgressBar(total=total, completed=done, width=30),
        Text(f"{100 * done // total:3} %", no_wrap=True),
        Text(where, no_wrap=True),
        at_end,
    )
    return grid


def _queue(queued: list[dict[str, Any]], report: dict[str, Any], now: datetime) -> RenderableType:
    grid = _grid()
    for position, job in enumerate(queued[:SHOWN_QUEUE]):
        eta = "" if job["eta_seconds"] is None else f"about {duration(job['eta_seconds'])}"
        note = job["note"] or (f"attempt {job['attempts'] + 1}" if job["attempts"] else "")
        grid.add_row(
            Text("  queue" if position == 0 else "", style="blue"),
            escape(_path(job)),
            f"{job['frames']} frames" + (f" ({job['clips']} clips)" if job["clips"] > 1 else ""),
            eta,
            Text(note, style="yellow"),
        )
    if len(queued) > SHOWN_QUEUE:
        grid.add_row("", f"and {len(queued) - SHOWN_QUEUE} more", "", "", "")
    if report["eta_seconds"] is not None:
        grid.add_row("", Text(f"all done {_finish(report['eta_seconds'], now)}", style="cyan"), "", "", "")
    return grid


def _moving(jobs: list[dict[str, Any]]) -> RenderableType:
    grid = _grid()
    for position, job in enumerate(jobs[:SHOWN_QUEUE]):
        delivery = job["delivery"]
        again = ""
        if delivery["next_try"]:
            again = f"tried again at {datetime.fromisoformat(delivery['next_try']).astimezone():%H:%M:%S}"
        grid.add_row(
            Text("  moving" if position == 0 else "", style="red" if delivery["reason"] else "blue"),
            escape(_path(job)),
            f"to be {delivery['state']}",
            Text(job["note"], style="yellow"),
            again,
        )
    if len(jobs) > SHOWN_QUEUE:
        grid.add_row("", f"and {len(jobs) - SHOWN_QUEUE} more", "", "", "")
    return grid


def _waiting(waiting: list[dict[str, Any]], now: datetime) -> RenderableType:
    grid = _grid()
    for position, entry in enumerate(waiting[:SHOWN_WAITING]):
        since = now - datetime.fromisoformat(entry["since"])
        folder = f"{entry['folder']}/" if entry["folder"] else ""
        grid.add_row(
            Text("  waiting" if position == 0 else "", style="yellow"),
            _text(folder + ", ".join(entry["files"])),
            f"for {duration(since.total_seconds())}",
            _text(f"missing: {entry['missing']}" if " " not in entry["missing"] else entry["missing"]),
        )
    if len(waiting) > SHOWN_WAITING:
        grid.add_row("", f"and {len(waiting) - SHOWN_WAITING} more", "", "")
    return grid


def _results(ended: list[dict[str, Any]], now: datetime) -> RenderableType:
    grid = _grid()
    for job in ended[:SHOWN_RESULTS]:
        state = "suspect" if job["state"] == "done" and job["quality"] else job["state"]
        ago = now - datetime.fromisoformat(job["finished_at"])
        grid.add_row(
            Text(f"  {state}", style=STATE_STYLES[state]),
            escape(_path(job)),
            f"{duration(ago.total_seconds())} ago",
            _text(": ".join(filter(None, (job["quality"], job["error"] or job["output"])))),
        )
    if len(ended) > SHOWN_RESULTS:
        grid.add_row("", f"and {len(ended) - SHOWN_RESULTS} more", "", "")
    return grid


def _grid() -> Table:
    """Give a table without lines, whose first column is as wide in all parts of the picture."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(min_width=LABEL_WIDTH)
    return grid


def _path(job: dict[str, Any]) -> str:
    return printable(f"{job['folder']}/{job['name']}" if job["folder"] else str(job["name"]))


def _text(value: object) -> str:
    """Make anything safe to print as it is."""
    return escape(printable(str(value)))


def _finish(seconds: float | None, now: datetime) -> str:
    """Say when something ends: how long from now, and the time on the clock."""
    if seconds is None:
        return ""
    local = (now + timedelta(seconds=seconds)).astimezone()
    day = "" if local.date() == now.astimezone().date() else f"{local:%a} "
    return f"in {duration(seconds)}, at {day}{local:%H:%M}"


def duration(seconds: float) -> str:
    """Put a span of time in words, to two units.

    >>> duration(7), duration(125), duration(3600 * 5 + 600), duration(86400 * 3)
    ('7 s', '2 min 5 s', '5 h 10 min', '3 d')
    """
    remaining = max(round(seconds), 0)
    words: list[str] = []
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        count, remaining = divmod(remaining, length)
        if count or words:
            words.append(f"{count} {unit}" if count else "")
        if len(words) == 2:
            break
    return " ".join(filter(None, words)) or "0 s"


def job(record: dict[str, Any]) -> RenderableType:
    """Draw one job whole."""
    facts = _grid()
    tables = ("inputs", "model_sources", "computation", "timings", "versions")
    for key, value in record.items():
        apart = ("history", "prompts", "continues", "loras", "delivery", "cuts", "warnings", *tables)
        if key in apart or value in (None, "", [], {}):
            continue
        facts.add_row(Text(f"  {key.replace('_', ' ')}", style="cyan"), _text(value))
    if delivery := record.get("delivery"):
        then = f"; tried again at {delivery['next_try']}" if delivery["next_try"] else ""
        told = f"to be {delivery['state']}: {delivery['reason'] or 'its files are being moved'}{then}"
        facts.add_row(Text("  delivery", style="yellow"), _text(told))
    for warning in record.get("warnings", ()):
        facts.add_row(Text("  warning", style="yellow"), _text(warning))
    if continued := record.get("continues"):
        known = "frames" if continued["latents"] is None else "latents"
        told = f"{continued['file']}, {continued['frames']} frames, from its {known}"
        facts.add_row(Text("  continues", style="cyan"), _text(told))
    for timed in record.get("prompts", []):
        sections = ", ".join(map(str, timed["sections"]))
        span = f"{timed['from']:g} to {timed['to']:g} s, section {sections}"
        facts.add_row(Text("  timed prompt", style="cyan"), _text(f"{timed['text']} ({span})"))
    for entry in record.get("loras", ()):
        facts.add_row(Text("  lora", style="cyan"), _text(loras.in_words(entry)))
    for key in tables:
        for name, value in (record[key] or {}).items():
            text = value["file"] if isinstance(value, dict) else str(value)
            facts.add_row(
                Text(f"  {key.replace('_', ' ')}: {name}", style="cyan"),
                _text(f"{text} s" if key == "timings" else text),
            )
    history = _grid()
    for entry in record["history"]:
        style = STATE_STYLES.get(entry["state"], "")
        history.add_row(f"  {entry['at']}", Text(entry["state"], style=style), _text(entry["note"]))
    return Group(Text(f"job {record['id']}", style="bold"), facts, Text("history", style="bold"), history)


def checks(results: Iterable["Check"]) -> RenderableType:
    """Draw checks: whether it is fine, what was looked at, what was found."""
    grid = Table.grid(padding=(0, 2))
    marks = {True: ("✓", "green"), False: ("✗", "red"), None: ("·", "dim"), "warning": ("!", "yellow")}
    for fine, what, found in results:
        grid.add_row(Text(*marks[fine]), Text(what, style="bold"), Text(printable(found)))
    return grid


PART_NAMES = {
    "core": "transformer, sampling loop",
    "embedders": "transformer, used once a video",
    "text_encoder": "text encoder (Llama)",
    "text_encoder_2": "text encoder (CLIP)",
    "image_encoder": "image encoder (SigLIP)",
    "vae": "VAE",
}


def forecast(found: "Forecast") -> RenderableType:
    """Draw a memory plan: what lives where, and what that takes."""
    plan, card, host = found.plan, found.card, found.host
    published = "" if found.weights.on_disk else ", which is not here: by the published sizes"
    title = Text.assemble(("memory plan", "bold"), f" for {found.model}{published}")
    table = Table("part", Column("GiB", justify="right"), "where")
    for part, (size, where) in plan.places.items():
        table.add_row(PART_NAMES[part], f"{size / GIB:.1f}", where)
    facts = Table.grid(padding=(0, 2))
    video = found.video
    facts.add_row("largest video", f"{video.width}x{video.height}, latent_window_size {video.window}")
    if card is not None:
        tile = plan.rungs[plan.rung].tile
        facts.add_row("decoding", f"in tiles of {tile} pixels" if tile else "whole frames")
        facts.add_row(
            "VRAM", f"{plan.vram / GIB:.1f} GiB at the peak, {card.free / GIB:.1f} free: {card.name}"
        )
    facts.add_row(
        "RAM",
        f"{plan.ram / GIB:.1f} GiB at the peak, {host.available / GIB:.1f} available; "
        f"and {plan.mapped / GIB:.1f} of files read in place, as far as there is room",
    )
    facts.add_row("speed", plan.speed)
    if plan.shortage is not None:
        facts.add_row("[red]too little[/red]", escape(plan.shortage))
    return Group(Text(), title, table, facts)


def models(rows: list[dict[str, Any]]) -> RenderableType:
    """Draw what ``models list --json`` holds: each model and its sources; the config's own with a star."""
    here, rest = (Column(title, justify="right", no_wrap=True) for title in ("here", "to fetch"))
    table = Table(Column("model", no_wrap=True), "kind", "source", here, rest, "files")
    for row in rows:
        first = [Text(row["name"] + (" *" if row["default"] else ""), "bold"), row["kind"]]
        if not row["sources"]:
            table.add_row(*first, Text("cannot be told: see below", "red"))
        for source in row["sources"]:
            lacking = len(source["missing"])
            files = Text(f"{lacking} missing", "yellow") if lacking else Text("complete", "green")
            fetch = size_text(source["bytes_to_fetch"]) if lacking else ""
            table.add_row(*first, _text(source["source"]), size_text(source["bytes_here"]), fetch, files)
            first = ["", ""]
    return table
