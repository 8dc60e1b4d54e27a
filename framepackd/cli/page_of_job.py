"""Draws one job as a page: what a person wants to know of it, in their units and at their clock's time."""

from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Column, Table
from rich.text import Text

from framepackd.cli.display import STATE_STYLES
from framepackd.jobs import drafts
from framepackd.jobs.report import Record
from framepackd.settings import loras
from framepackd.text import clock, duration, path_of, percent, printable

Row = tuple[str, str]

# In the order in which a person asks; what a page tells in words of its own is not among them.
SETTINGS = (
    "prompt",
    "negative_prompt",
    "more",
    "seed",
    "model",
    "resolution",
    "background",
    "steps",
    "cache",
    "latent_window_size",
    "guidance_scale",
    "true_cfg_scale",
    "guidance_rescale",
    "crf",
    "gpu_memory_preservation",
    "frame_diff",
    "keyframes",
    "save_section_frames",
    "keep_latents",
    "embed_metadata",
)
# The values of these at which they do nothing.
IDLE = {"true_cfg_scale": 1.0, "guidance_rescale": 0.0, "cache": "none"}
UNITS = {"gpu_memory_preservation": "GiB"}
TIMINGS = {
    "load": "loading",
    "encode": "reading picture and prompt",
    "sample": "sampling",
    "decode": "decoding",
    "write": "writing",
}
TOLD = {  # by a row of their own
    *(
        "id",
        "name",
        "folder",
        "state",
        "history",
        "error",
        "output",
        "quality",
        "warnings",
        "note",
        "delivery",
    ),
    *(
        "created_at",
        "started_at",
        "finished_at",
        "reason_file",
        "stage",
        "progress",
        "preview",
        "preview_picture",
    ),
    *("width", "height", "frames", "seconds", "clips", "fps", "sections", "section", "steps_total", "step"),
    *("steps_run", "step_seconds", "decode_seconds", "attempts", "resumes", "device", "inputs", "continues"),
    *("prompts", "loras", "model_sources", "computation", "timings", "versions", "cuts"),
    *("draft", "final", "draft_of"),
}
WARN = ("error", "quality", "warning", "note", "delivery")


def page(record: Record, now: datetime) -> RenderableType:
    """Draw one job."""
    style = STATE_STYLES.get(record["state"], "")
    name = printable(path_of(record.get("folder") or "", record["name"]))
    name += " (draft)" if record.get("draft") else ""
    title = Text.assemble((name, "bold"), "  ", (record["state"], style), "  ", (record["id"], "dim"))
    sections = (
        ("", _fate(record, now)),
        ("video", _video(record)),
        ("settings", _settings(record)),
        ("inputs", _inputs(record)),
        ("made with", _made_with(record)),
    )
    parts: list[RenderableType] = [title]
    for head, rows in sections:
        found = list(rows)
        if head and found:
            parts.append(Text(head, style="bold"))
        parts += [_grid(found)] if found else []
    if record["history"]:
        history = Table.grid(Column(), Column(), Column(overflow="fold"), padding=(0, 2))
        for entry in record["history"]:
            state = Text(entry["state"], style=STATE_STYLES.get(entry["state"], ""))
            history.add_row(f"  {_when(entry['at'], now)}", state, Text(printable(entry["note"])))
        parts += [Text("history", style="bold"), history]
    return Group(*parts)


def _grid(rows: list[Row]) -> Table:
    grid = Table.grid(Column(min_width=18), Column(overflow="fold"), padding=(0, 2))
    for label, words in rows:
        style = "yellow" if label in WARN else "cyan"
        grid.add_row(Text(f"  {printable(label)}", style=style), Text(printable(words)))
    return grid


def _when(time: str, now: datetime) -> str:
    """Give a time as clocks here show it; with the date where that is not today's."""
    local = datetime.fromisoformat(time).astimezone()
    return clock(time, now, seconds=True) if local.date() == now.astimezone().date() else f"{local:%F %T}"


def _fate(record: Record, now: datetime) -> Iterator[Row]:
    """Say what became of the job, and where its files are."""
    if record.get("error"):
        yield "error", record["error"]
    if record.get("quality"):
        yield "quality", record["quality"]
    if record.get("stage"):
        yield "progress", ", ".join([f"{percent(record['progress'] or 0)} %", *record["stage"]])
    if delivery := record.get("delivery"):
        again = f"; tried again at {_when(delivery['next_try'], now)}" if delivery["next_try"] else ""
        yield "delivery", f"to be {delivery['state']}: {record['note'] or 'its files are moved'}{again}"
    elif record.get("note"):
        yield "note", record["note"]
    for warning in record.get("warnings", ()):
        yield "warning", warning
    if record.get("output"):
        yield "output", record["output"]
    if reason := record.get("reason_file"):
        yield "files in", str(Path(reason).parent)
        yield "reason in", Path(reason).name
    for key in ("preview", "preview_picture"):
        if record.get(key):
            yield key.replace("_", " "), record[key]
    for label, key in (("taken in", "created_at"), ("started", "started_at"), ("ended", "finished_at")):
        if record.get(key):
            yield label, _when(record[key], now)
    if record.get("attempts"):
        yield "failed attempts", str(record["attempts"])
    if record.get("resumes"):
        yield "resumed", f"{record['resumes']} times" if record["resumes"] > 1 else "once"


def _video(record: Record) -> Iterator[Row]:
    if record.get("width"):
        yield "size", f"{record['width']}x{record['height']} pixels"
    if record.get("frames"):
        length = f"{record['frames'] / record['fps']:.1f} s ({record['frames']} frames)"
        yield "length", length + (f", {record['clips']} clips" if record["clips"] > 1 else "")
    if record.get("sections"):
        done = record.get("section") or 0
        at = f", {done} begun" if record["state"] != "done" and done else ""
        yield "sections", f"{record['sections']}{at}"
    if continued := record.get("continues"):
        known = "frames" if continued["latents"] is None else "latents"
        yield "continues", f"{continued['file']}, {continued['frames']} frames, from its {known}"


def _settings(record: Record) -> Iterator[Row]:
    others = [key for key in record if key not in TOLD and key not in SETTINGS]
    for key in (*SETTINGS, *others):
        value = record.get(key)
        if value in (None, "", [], {}, False) or value == IDLE.get(key):
            continue
        if value is True:
            value = "yes"
        elif isinstance(value, float):
            value = f"{value:g}"
        yield key.replace("_", " "), f"{value} {UNITS[key]}" if key in UNITS else str(value)
    for timed in record.get("prompts", ()):
        sections = ", ".join(map(str, timed["sections"]))
        span = f"{timed['from']:g} to {timed['to']:g} s, section {sections}"
        yield "timed prompt", f"{timed['text']} ({span})"
    for entry in record.get("loras", ()):
        yield "lora", loras.in_words(entry)
    yield from drafts.in_words(record)


def _inputs(record: Record) -> Iterator[Row]:
    for role, value in (record.get("inputs") or {}).items():
        yield role, "; ".join([value["file"], *value.get("passed_over", ())])


def _made_with(record: Record) -> Iterator[Row]:
    if record.get("device"):
        yield "device", record["device"]
    for key, label in (("step_seconds", "a step"), ("decode_seconds", "decoding a section")):
        if record.get(key):
            yield label, _span(record[key])
    timings = record.get("timings") or {}
    for key, seconds in timings.items():
        if seconds:
            yield TIMINGS.get(key, key), _span(seconds)
    for key, value in (record.get("computation") or {}).items():
        if value not in (None, "", False):
            yield key.replace("_", " "), "yes" if value is True else str(value)
    for role, source in (record.get("model_sources") or {}).items():
        yield role.replace("_", " "), str(source)
    if versions := record.get("versions"):
        yield "versions", ", ".join(f"{name} {version}" for name, version in versions.items())


def _span(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds < 10 else duration(seconds)
