"""The messages of a bridge and its node as frames; what arrives is checked before anybody acts on it."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pydantic import TypeAdapter

from framepackd.cluster.inventory import Entry
from framepackd.cluster.names import RefusedError
from framepackd.cluster.wire import Frame
from framepackd.worker import messages
from framepackd.worker.messages import Hello, Kept, Message, Written

# How the run of a job on a node may end; also what may be said to be the end of its writing.
ENDS = (
    messages.Finished,
    messages.Stopped,
    messages.Failed,
    messages.Again,
    messages.Blocked,
    messages.Waits,
)
OF_FILES = (messages.Kept, messages.Clear, messages.Moved)
_ON_THE_WAY = (
    messages.Resumed,
    messages.SetAside,
    messages.PromptsCut,
    messages.Ready,
    messages.Lowered,
    messages.Uncompiled,
    messages.StepDone,
    messages.SectionDecoded,
    messages.Sampled,
)


@dataclass(frozen=True)
class Open:
    """The first frame of a connection, for the link: which card it is about."""

    host: str
    device: str


@dataclass(frozen=True)
class Begin:
    """A job for a node. The body holds, as JSON, its description and the files that it needs."""

    run: int  # counts the jobs that a bridge began
    job: str  # its id


@dataclass(frozen=True)
class Part:
    """A part of a file that a node lacks, in the body; parts come in order."""

    run: int
    name: str
    offset: int  # bytes


@dataclass(frozen=True)
class Go:
    """All that a node lacked is there."""

    run: int


@dataclass(frozen=True)
class Tell:
    """The worker shall leave its job at the next step and, with ``keep``, write what exists."""

    run: int
    keep: bool


@dataclass(frozen=True)
class Lacks:
    """What a node has to be sent before it can begin a job."""

    run: int
    names: tuple[str, ...]


@dataclass(frozen=True)
class Said:
    """What a worker says, and about which run."""

    run: int
    message: Message


@dataclass(frozen=True)
class Alive:
    """A sign of life of the link and its node."""


ToNode = Begin | Part | Go | Tell
ToFront = Lacks | Said | Hello | messages.Died | messages.Lost | Alive
_TO_NODE: dict[str, TypeAdapter[Any]] = {kind.__name__: TypeAdapter(kind) for kind in (Begin, Part, Go, Tell)}
_TO_FRONT: dict[str, TypeAdapter[Any]] = {
    kind.__name__: TypeAdapter(kind) for kind in (Lacks, Hello, messages.Died, messages.Lost, Alive)
}
_SAID: dict[str, TypeAdapter[Any]] = {
    kind.__name__: TypeAdapter(kind) for kind in (*OF_FILES, *_ON_THE_WAY, *ENDS)
}
_FILES = TypeAdapter(list[Entry])


def header(frame: Open | ToNode | Lacks | Hello | messages.Died | messages.Lost) -> dict[str, Any]:
    """Give a frame's header."""
    kind = type(frame)
    fields: dict[str, Any] = TypeAdapter(kind).dump_python(frame, mode="json")
    return {"kind": kind.__name__, **fields}


def said(run: int, message: Message) -> tuple[dict[str, Any], bytes]:
    """Give the header and the body of what a worker says.

    Raises:
        KeyError: it is nothing that a worker says on a node.
    """
    body = message.content if isinstance(message, Kept) else b""
    return {"kind": "Said", "run": run, **_described(message)}, body


def _described(message: Message) -> dict[str, Any]:
    kind = type(message).__name__
    if isinstance(message, Written):
        return {"type": kind, "message": _described(message.reply)}
    return {"type": kind, "message": _SAID[kind].dump_python(message, mode="json", exclude={"content"})}


def to_front(frame: Frame) -> ToFront:
    """Read what has arrived at a bridge.

    Raises:
        RefusedError: it is nothing that a node sends.
    """
    if frame.kind == "Said":
        run, kind, fields = (frame.header.get(key) for key in ("run", "type", "message"))
        if type(run) is int and isinstance(kind, str):
            return Said(run, _message(kind, fields, frame.body))
    found: ToFront = _read(_TO_FRONT, frame.kind, _fields(frame))
    return found


def to_node(frame: Frame) -> ToNode:
    """Read what has arrived at a node.

    Raises:
        RefusedError: it is nothing that a bridge sends.
    """
    found: ToNode = _read(_TO_NODE, frame.kind, _fields(frame))
    return found


def _fields(frame: Frame) -> dict[str, Any]:
    return {key: value for key, value in frame.header.items() if key != "kind"}


def _message(kind: str, fields: object, body: bytes) -> Message:
    if kind == Written.__name__ and isinstance(fields, dict):
        inner = str(fields.get("type"))
        if inner in {end.__name__ for end in ENDS}:
            return Written(_message(inner, fields.get("message"), b""))
    if kind == Kept.__name__ and isinstance(fields, dict):
        kept: Kept = _read(_SAID, kind, {**fields, "content": ""})
        return replace(kept, content=body)
    found: Message = _read(_SAID, kind, fields)
    return found


def _read(known: Mapping[str, TypeAdapter[Any]], kind: str, fields: object) -> Any:
    if kind not in known:
        raise RefusedError(f"a frame of the unknown kind {kind[:40]!r}")
    try:
        return known[kind].validate_json(json.dumps(fields, allow_nan=False), strict=True)
    except (ValueError, RecursionError) as error:  # pydantic's too
        raise RefusedError(f"a {kind} that is none: {error}") from error


def description(work: bytes, entries: Iterable[Entry]) -> bytes:
    """Give the body of :class:`Begin`: a job as JSON, and the files that it needs."""
    listed = _FILES.dump_python(list(entries), mode="json")
    return json.dumps({"work": work.decode(), "files": listed}, ensure_ascii=False).encode()


def described(body: bytes) -> tuple[bytes, dict[str, Entry]]:
    """Read the body of :class:`Begin`: the job as JSON, and the files by name.

    Raises:
        RefusedError: it is something else.
    """
    try:
        found = json.loads(body)
        entries = _FILES.validate_python(found["files"])
        return found["work"].encode(), {entry.name: entry for entry in entries}
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise RefusedError(f"a Begin that describes no job: {error}") from error
