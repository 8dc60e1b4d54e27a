"""A real daemon in which every call that changes something durable is a numbered point where it can die.

``python -m tests.crash.victim run --once --config FILE``. The patches are made on import, so that they hold
in the worker process too, which imports its parent's main module. What is to happen where comes from a
folder, ``$CRASH_CONTROL``: see ``Plan``. Without it nothing is patched.
"""

import builtins
import ctypes
import fcntl
import functools
import io
import json
import os
import signal
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import framepackd

_DAEMON = str(Path(framepackd.__file__).parent)
EXT4_IOC_SHUTDOWN = 0x8004587D  # also XFS_IOC_GOINGDOWN
_PR_SET_PDEATHSIG = 1
GOINGDOWN_LOGFLUSH, GOINGDOWN_NOLOGFLUSH = 1, 2  # what was not fsynced is lost: its content, or all of it

# Functions of the daemon by the phase of a job's life; the innermost on the stack that is named counts.
PHASES = {
    "intake": ("take", "take_final", "adopt_leftovers", "_record", "add"),
    "claim": ("claim", "resumed", "start_next"),
    "step": ("step",),
    "checkpoint": ("save", "load", "clear"),
    "decode": ("_keep", "decoded"),
    "preview": ("write_preview",),
    "encode": ("write",),
    "publish": ("deliver", "decide"),
    "finish": ("finish",),
    "page": ("update", "keep_strip"),
}
PHASE_OF = {function: phase for phase, functions in PHASES.items() for function in functions}
PHASE_OF_MESSAGE = {"StepDone": "step", "SectionDecoded": "decode", "Work": "claim"}
PHASE_OF_MESSAGE |= dict.fromkeys(("Finished", "Sampled", "Written"), "encode")


Victim = Literal["all", "this", "workers"]  # the whole daemon, this process alone, all its workers


@dataclass(frozen=True)
class Plan:
    """What is to happen to this life of the daemon, and at which point."""

    after: float = 0.0  # so many seconds after the start, by the harness, if not 0
    number: int = 0  # at the so-manieth point, if not 0
    labels: tuple[str, ...] = ()  # or where one of these is done, or any that begins like them
    occurrence: int = 1  # for the so-manieth time
    power: str = ""  # the root of a mount that loses its power first
    power_mode: int = GOINGDOWN_NOLOGFLUSH
    every: int = 0  # and again after so many more, if not 0
    whom: tuple[Victim, ...] = ("all",)  # dies, in turn
    error: int = 0  # raise this errno, once, instead of dying
    jump_years: float = 0.0  # from then on the clock is off by so much

    def write(self, control: Path) -> None:
        """Have the next daemon follow it, counting from one."""
        for name in ("counter", "points", "fired"):
            (control / name).unlink(missing_ok=True)
        (control / "plan.json").write_text(json.dumps(asdict(self)))


class Points:
    """Counts the points of all processes of one daemon, and does what is planned at one of them."""

    def __init__(self, control: Path) -> None:
        self._control = control
        self._plan = Plan(**json.loads(_read(control / "plan.json")))
        # Opened now: later these calls are points themselves.
        self._counter = os.open(control / "counter", os.O_RDWR | os.O_CREAT, 0o644)
        self._points = os.open(control / "points", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._mount = os.open(self._plan.power, os.O_RDONLY) if self._plan.power else None
        self._lock = threading.RLock()

    def reach(self, call: str) -> None:
        """Note that a call is about to happen, or has happened; die here if that is the plan."""
        label = _label(call)
        if label is None:
            return
        with self._lock:  # nobody gets past another point while one dies
            fcntl.flock(self._counter, fcntl.LOCK_EX)
            try:
                counts = Counter(json.loads(os.pread(self._counter, 1 << 20, 0) or b"{}"))
                counts[label] += 1
                number = counts.total()
                # Longer each time: counts never shrink.
                os.pwrite(self._counter, json.dumps(counts).encode(), 0)
                os.write(self._points, f"{number} {os.getpid()} {label}\n".encode())
                if number == self._plan.number or self._is_planned(label, counts):
                    self._happen(label)
            finally:
                fcntl.flock(self._counter, fcntl.LOCK_UN)

    def _is_planned(self, label: str, counts: Counter[str]) -> bool:
        wanted = tuple(self._plan.labels)
        if not label.startswith(wanted):
            return False
        more = sum(counts[other] for other in counts if other.startswith(wanted)) - self._plan.occurrence
        return more == 0 or (self._plan.every > 0 < more and more % self._plan.every == 0)

    def _happen(self, label: str) -> None:
        fired = os.open(self._control / "fired", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        before = os.fstat(fired).st_size
        os.write(fired, b".")
        os.close(fired)
        plan = self._plan
        whom = plan.whom[before % len(plan.whom)]
        if plan.error:
            raise OSError(plan.error, os.strerror(plan.error), label)
        if plan.jump_years:
            return
        if self._mount is not None:
            fcntl.ioctl(self._mount, EXT4_IOC_SHUTDOWN, struct.pack("I", plan.power_mode))
        if whom == "all":
            os.killpg(0, signal.SIGKILL)
        if whom == "workers":
            for worker in self._workers():
                os.kill(worker, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)  # until it arrives

    def _workers(self) -> set[int]:
        """Give the other workers that have reached a point and are still there."""
        seen = {int(line.split()[1]) for line in _read(self._control / "points").splitlines()}
        here = {pid for pid in seen if os.access(f"/proc/{pid}", os.F_OK)}
        return here - {os.getpid(), os.getpgrp()}

    def clock_error(self) -> float:
        """Give the seconds by which the clock is off."""
        jumped = self._plan.jump_years and os.access(self._control / "fired", os.F_OK)
        return self._plan.jump_years * 365.25 * 86400 if jumped else 0.0


def _read(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read()


def _label(call: str) -> str | None:
    """Name where we are: phase, function of the daemon, call; None if the daemon has no part in it."""
    function, phase = None, PHASE_OF_MESSAGE.get(call.rpartition(" ")[2])
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        module, name = frame.f_code.co_filename, frame.f_code.co_name
        if module.startswith(_DAEMON):
            if function is None or function.startswith(("files.", "moving.")):  # who calls those counts
                function = f"{Path(module).stem}.{name}"
            phase = phase or PHASE_OF.get(name)
        frame = frame.f_back
    return function and f"{phase or 'start'}:{function}:{call}"


def _what(path: object) -> str:
    """Tell the kind of a file without what differs from run to run."""
    if isinstance(path, int):
        path = Path(f"/proc/self/fd/{path}").readlink()
    name = Path(os.fsdecode(path)).name if isinstance(path, str | bytes | os.PathLike) else ""
    name = name.removeprefix(".framepackd-").removesuffix(".part")
    for kind in (
        "state-",
        "latents-",
        "segment-",
        "edge-",
        "preview",
        "manifest",
        "delivery",
        "moving",
        "outgoing",
        "section",
    ):
        if kind in name:
            return kind.strip("-")
    return Path(name).suffix.strip(".") or ("folder" if name else "")


def _before(module: Any, name: str, points: Points) -> None:
    original = getattr(module, name)

    @functools.wraps(original)
    def reaching(*arguments: Any, **named: Any) -> Any:
        points.reach(f"{name} {_what(arguments[0])}".strip())
        return original(*arguments, **named)

    setattr(module, name, reaching)


def _patch_files(points: Points) -> None:
    from framepack_core.media import segments
    from framepack_core.media.pictures import Picture
    from framepackd import files

    for name in ("fsync", "rename", "replace", "unlink", "mkdir", "rmdir", "link"):
        _before(os, name, points)
    _before(files, "rename_new", points)
    _before(files, "write_all", points)

    def write_bytes(path: Path, content: bytes) -> int:
        points.reach(f"write {_what(path)}")
        with path.open("wb") as file:
            file.write(content[: len(content) // 2])
            file.flush()
            points.reach(f"write half of {_what(path)}")
            return file.write(content[len(content) // 2 :])

    Path.write_bytes = write_bytes  # type: ignore[method-assign, assignment] # as the original, with points

    encode, join = segments.encode, segments.join

    def encoding(frames: Iterable[Picture], **named: Any) -> bytes:
        def reaching() -> Iterator[Picture]:
            for picture in frames:
                points.reach("encode a picture")
                yield picture

        return encode(reaching(), **named)

    def joining(path: Path, pieces: Iterable[bytes], *tags: Any) -> int:
        def reaching() -> Iterator[bytes]:
            for piece in pieces:
                points.reach("join a segment")
                yield piece

        frames = join(path, reaching(), *tags)
        points.reach("segments joined")
        return frames

    segments.encode, segments.join = encoding, joining

    original = io.open

    def opening(file: Any, mode: str = "r", *arguments: Any, **named: Any) -> Any:
        if mode[0] in "wxa":
            points.reach(f"open {_what(file)}")
        return original(file, mode, *arguments, **named)

    builtins.open = io.open = opening  # type: ignore[assignment] # too many overloads


def _patch_database(points: Points) -> None:
    from sqlalchemy import event
    from sqlalchemy.engine.default import DefaultDialect

    from framepackd.jobs.job import Base

    original: Callable[..., None] = DefaultDialect.do_commit

    def do_commit(dialect: DefaultDialect, connection: Any) -> None:
        writes = connection.dbapi_connection.total_changes > 0  # each transaction has its own connection
        if writes:
            points.reach("before commit")
        original(dialect, connection)
        if writes:
            points.reach("after commit")

    DefaultDialect.do_commit = do_commit  # type: ignore[method-assign, assignment] # the same, with points
    for moment in ("before_create", "after_create"):
        event.listen(Base.metadata, moment, lambda *_, moment=moment, **__: points.reach(moment))


def _patch_messages(points: Points) -> None:
    original = Connection.send

    def send(connection: Connection, message: Any) -> None:
        points.reach(f"before send {type(message).__name__}")
        original(connection, message)
        points.reach(f"after send {type(message).__name__}")

    Connection.send = send  # type: ignore[method-assign, assignment] # the same, with points


def _patch_clock(points: Points) -> None:
    import datetime

    from framepackd.inbox import scan
    from framepackd.intake import take
    from framepackd.jobs import database

    original = time.time
    time.time = lambda: original() + points.clock_error()

    class Jumping(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return super().now(tz) + datetime.timedelta(seconds=points.clock_error())

    for module in (database, scan, take):
        module.datetime = Jumping  # type: ignore[attr-defined] # they import it, but do not export it


def _patch() -> None:
    control = os.environ.get("CRASH_CONTROL")
    if control is None:
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # nothing outlives the harness
    # A worker takes a quarter of its start to import what quantizes no model here.
    sys.modules["bitsandbytes"] = None  # type: ignore[assignment] # as documented: its import fails
    points = Points(Path(control))
    _patch_clock(points)
    _patch_database(points)
    _patch_messages(points)
    _patch_files(points)


if __name__ in ("__main__", "__mp_main__"):
    _patch()

if __name__ == "__main__":
    from framepackd.cli.main import main

    main(prog_name="framepackd")
