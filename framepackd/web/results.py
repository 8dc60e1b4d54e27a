"""Draws the results: the gallery by days, and one result with how it was made, in words."""

import asyncio
from collections.abc import Sequence
from datetime import date, datetime, timedelta
from itertools import groupby
from typing import Any
from urllib.parse import urlencode

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from framepackd.delivery.results import ResultRecord
from framepackd.delivery.results_page import INDEX, is_ours
from framepackd.text import duration
from framepackd.web.again import read_record
from framepackd.web.gallery import PAGE, Shown, Wanted
from framepackd.web.rendering import label, render, said, seconds
from framepackd.web.site import Shared

MORNING = range(5, 12)  # hours in which the night's results are greeted
EVENING = 18  # the hour at which a night begins
CACHES = {"teacache": "TeaCache", "magcache": "MagCache"}


def greeting(results: Sequence[Shown], now: datetime) -> str:
    """Say good morning to who comes for what the night has made."""
    if now.hour not in MORNING:
        return "Results"
    evening = (now - timedelta(days=1)).replace(hour=EVENING, minute=0)
    new = sum(1 for shown in results if shown.result.record.finished_at > evening)
    return f"Good morning. {new} new." if new else "Results"


def day_name(day: date, today: date) -> str:
    """Name a day as people do."""
    return {0: "Today", 1: "Yesterday"}.get((today - day).days, f"{day:%A} {day.day} {day:%B}")


def gallery_context(shared: Shared, request: Request) -> dict[str, Any]:
    """Give what the gallery shows: the results that are asked for, from a place on."""
    query = request.query_params
    everything = shared.gallery.all()
    wanted = Wanted(
        words=query.get("q", "")[:200],
        folder=query.get("folder") if "folder" in query and query["folder"] != "*" else None,
        model=query.get("model") or None,
        day=query.get("day") or None,
        odd=bool(query.get("odd")),
        draft=bool(query.get("draft")),
    )
    chosen = wanted.chosen(everything)
    start = int(query.get("from", "0")) if query.get("from", "0").isdecimal() else 0
    now = datetime.now().astimezone()
    page = chosen[start : start + PAGE]
    before = chosen[start - 1].day if 0 < start <= len(chosen) else None
    days = [
        {"day": day, "name": day_name(day, now.date()), "goes_on": day == before, "tiles": list(tiles)}
        for day, tiles in groupby(page, key=lambda shown: shown.day)
    ]
    counts: dict[date, int] = {}
    for shown in chosen:
        counts[shown.day] = counts.get(shown.day, 0) + 1
    more = {key: value for key, value in query.items() if key not in ("from", "said") and value}
    left = len(chosen) - start - len(page)
    return {
        "greeting": greeting(everything, now),
        "total": len(everything),
        "found": len(chosen),
        "days": days,
        "counts": counts,
        "folders": sorted({shown.folder for shown in everything}),
        "models": sorted({shown.result.record.model for shown in everything}),
        "odd_count": sum(1 for shown in everything if shown.result.record.quality),
        "draft_count": sum(1 for shown in everything if shown.result.record.draft),
        "wanted": wanted,
        "left": left,
        "next": f"/results?{urlencode({**more, 'from': start + PAGE})}" if left > 0 else None,
        "newest": everything[0].id if everything else "",
        "part": start > 0,
        "index": is_ours(shared.config.outbox / INDEX),
    }


def result_context(shared: Shared, job: str) -> dict[str, Any] | None:
    """Give what the page of one result shows; None if it is not in the outbox."""
    results = shared.gallery.all()
    at = next((number for number, shown in enumerate(results) if shown.id == job), None)
    if at is None:
        return None
    shown = results[at]
    try:
        record = read_record(shared.config, shown)
    except OSError:
        record = {}
    roles = zip(shown.result.links, shown.result.inputs, strict=True)
    return {
        "shown": shown,
        "record": shown.result.record,
        "words": in_words(shown, record),
        "other": _other(shared, shown.result.record),
        "files": [path.rpartition("/")[2] for (role, _), path in roles if role != "picture"],
        "place": at + 1,
        "total": len(results),
        "newer": results[at - 1].id if at else None,
        "older": results[at + 1].id if at + 1 < len(results) else None,
        "cached": record.get("cache", "none") != "none",
        "longer": round(min(shown.seconds * 2, 120), 1),
    }


def _other(shared: Shared, record: ResultRecord) -> str | None:
    """Give the id of a draft's final, or of a final's draft, if its video is in the outbox."""
    other = record.final or record.draft_of
    return other.id if other and other.id and shared.gallery.find(other.id) else None


def in_words(shown: Shown, record: dict[str, Any]) -> list[tuple[str, str]]:
    """Say how a result was made: what it is, and the words for it."""
    short = shown.result.record
    sections = record.get("sections")
    rows = [
        (
            "Length",
            f"{seconds(shown.seconds)}, {f'{sections} sections, ' if sections else ''}{short.frames} frames",
        ),
        ("Size", f"{short.width} × {short.height}"),
        ("Model", label(short.model)),
        ("Seed", "" if short.seed is None else str(short.seed)),
        ("Style", _styles(record.get("loras"))),
        ("Steps", _steps(short.steps, record.get("cache"))),
        ("Draft", _draft(record)),
        ("Prompts", "; ".join(_timed(record.get("prompts")))),
        ("Took", _took(short.timings, short.device)),
        ("Looks", f"{said(short.quality)}" if short.quality else ""),
        ("Also", _also(record)),
    ]
    rows += [("Note", said(text)) for text in short.warnings]
    return [(name, text) for name, text in rows if text]


def _styles(loras: Any) -> str:
    if not isinstance(loras, list):
        return ""
    named = (each for each in loras if isinstance(each, dict) and "file" in each)
    return ", ".join(
        f"{said(str(each['file']).removesuffix('.safetensors'))} at {each.get('weight', 1)}" for each in named
    )


def _timed(prompts: Any) -> list[str]:
    listed = prompts if isinstance(prompts, list) else []
    return [
        f"{said(str(each.get('text')))} (from {each.get('from')} to {each.get('to')} s)"
        for each in listed
        if isinstance(each, dict)
    ]


def _steps(steps: int | None, cache: Any) -> str:
    if not steps:
        return ""
    return f"{steps}, with {CACHES[cache]}" if cache in CACHES else f"{steps}, without a cache"


def _draft(record: dict[str, Any]) -> str:
    """Say of a draft what its final is made with, and of a final what its draft was made with."""
    for key, words in (("final", "this is one; its final takes"), ("draft_of", "it had one of")):
        other = record.get(key)
        if isinstance(other, dict) and isinstance(other.get("steps"), int):
            return f"{words} {_steps(other['steps'], other.get('cache'))}"
    return ""


def _took(timings: dict[str, float], device: str | None) -> str:
    return f"{duration(sum(timings.values()))}{f' on {said(device)}' if device else ''}" if timings else ""


def _also(record: dict[str, Any]) -> str:
    resumes = record.get("resumes")
    return "came through a restart" if isinstance(resumes, int) and resumes else ""


async def gallery_page(shared: Shared, request: Request, common: dict[str, Any]) -> Response:
    """Draw the gallery, or the next part of it."""
    shown = common | await asyncio.to_thread(gallery_context, shared, request)
    template = "_wall.html" if shown["part"] else "results.html"
    return HTMLResponse(render(template, **shown), headers={"cache-control": "no-store"})
