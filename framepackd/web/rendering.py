"""Fills the page's templates: whatever a name or a prompt holds is text in them, and no more."""

import hashlib
from datetime import UTC, datetime, timedelta
from functools import cache
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined

from framepackd.inbox.naming import is_picture
from framepackd.text import as_utf8, printable

LABELS = {"framepack": "FramePack", "f1": "F1"}  # of the models that people know by another name
VERSION = "@version@"  # in a fragment, where its hash is to stand
SOON = timedelta(hours=18)  # a clock alone is clear for so long


def render(template: str, **shown: Any) -> str:
    """Fill a template."""
    return _environment().get_template(template).render(**shown)


def fragment(template: str, **shown: Any) -> str:
    """Fill a template whose first element carries a hash of all it shows: pages replace what has changed."""
    text = render(template, **shown).strip()
    return text.replace(VERSION, hashlib.sha256(text.encode()).hexdigest()[:12], 1)


@cache
def static(name: str) -> str:
    """Give the address of a file of the page; it changes with the file, so that browsers may keep it."""
    version = hashlib.sha256(_file("static", name).read_bytes()).hexdigest()[:12]
    return f"/page/static/{name}?v={version}"


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FunctionLoader(lambda name: _file("templates", name).read_text("utf-8")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
    )
    environment.filters |= {"clock": clock, "span": span, "said": said, "label": label, "seconds": seconds}
    environment.filters |= {"moment": moment, "start_large": start_large}
    environment.tests["is_shown"] = is_picture
    environment.globals |= {"static": static, "version": VERSION, "fragment": fragment}
    return environment


def _file(folder: str, name: str) -> Traversable:
    return resources.files("framepackd.web").joinpath(folder, name)


def said(text: str | None) -> str:
    """Keep control characters, also those that turn the direction of text, from doing anything."""
    return "\n".join(printable(as_utf8(line)) for line in (text or "").split("\n"))


def start_large(text: str) -> str:
    """Begin a text as a sentence begins, unless that is a file's name, and leave its end to who shows it.

    >>> start_large("only one of a and b may stay."), start_large("cat.png is empty")
    ('Only one of a and b may stay', 'cat.png is empty')
    """
    first = text.partition(" ")[0]
    return (text if "." in first or "_" in first else text[:1].upper() + text[1:]).rstrip(". \n")


def label(model: str | None) -> str:
    """Call a model as people do.

    >>> label("framepack"), label("demo")
    ('FramePack', 'demo')
    """
    return LABELS.get(model or "", said(model))


def seconds(value: float | None) -> str:
    """Write a length as people say it.

    >>> seconds(4.83), seconds(24.03)
    ('4.8 s', '24 s')
    """
    return "" if value is None else f"{value:.1f}".removesuffix(".0") + " s"


def span(value: float | None) -> str:
    """Say how long something takes, to what a person can use.

    >>> span(42.0), span(250.0), span(18_540.0)
    ('42 s', '4 min', '5 h 9 min')
    """
    if value is None:
        return ""
    if value < 90:
        return f"{max(round(value), 1)} s"
    minutes = round(value / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def clock(when: str | datetime | None) -> str:
    """Say at what time, and on which day where that is not clear."""
    if when is None:
        return ""
    local = _local(when)
    far = abs(local - datetime.now(UTC)) > SOON
    return f"{local:%a %H:%M}" if far else f"{local:%H:%M}"


def moment(when: str | datetime | None) -> str:
    """Say when something was, by day and time."""
    if when is None:
        return ""
    local = _local(when)
    days = (datetime.now(UTC).astimezone().date() - local.date()).days
    day = {0: "today", 1: "yesterday"}.get(days, f"{local:%A} {local.day} {local:%B}")
    return f"{day}, {local:%H:%M}"


def _local(when: str | datetime) -> datetime:
    return (datetime.fromisoformat(when) if isinstance(when, str) else when).astimezone()
