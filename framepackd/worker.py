"""The worker process: loads a model, generates what it is told to, tells how far it is.

A process of its own, so that a crash of the model's code takes neither the daemon nor the queue with it.
Only here is torch imported, and only inside functions: the daemon imports this module for its messages.
"""

import ctypes
import importlib.metadata
import logging
import multiprocessing
import multiprocessing.process
import os
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import framepack_core
from framepack_core import media
from framepack_core.errors import FramePackError
from framepack_core.models import ModelSpec
from framepack_core.request import Request
from framepackd import files
from framepackd.database import Job

if TYPE_CHECKING:
    from framepack_core.engine import Engine

log = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Work:
    """What the worker is told to do."""

    job_id: str
    request: Request
    spec: ModelSpec
    result: Path  # folder to write the video and the stills to
    frames: int
    crf: int
    save_section_frames: bool
    device: str
    dtype: str


@dataclass(frozen=True)
class Ready:
    """The model is loaded."""

    device: str


@dataclass(frozen=True)
class StepDone:
    """A sampling step is done; sections count from 1."""

    section: int
    step: int
    seconds: float


@dataclass(frozen=True)
class SectionDecoded:
    """A section is decoded."""

    seconds: float


@dataclass(frozen=True)
class Finished:
    """The video is written, checked and durable."""

    timings: dict[str, float]
    versions: dict[str, str]


@dataclass(frozen=True)
class Stopped:
    """The loop was left because the worker was told so."""


@dataclass(frozen=True)
class Failed:
    """The job cannot be done, or could not this time."""

    error: str
    retry: bool


Message = Ready | StepDone | SectionDecoded | Finished | Stopped | Failed


@dataclass
class Handle:
    """The daemon's end: the process, the connection to it, and the job it is on."""

    process: multiprocessing.process.BaseProcess
    connection: Connection
    job: Job | None = None
    stop_sent: float | None = None

    def manner_of_death(self) -> str:
        """Say in words how the process ended."""
        code = self.process.exitcode or 0
        if code >= 0:
            return f"ended by itself with exit code {code}"
        killed = signal.Signals(-code)
        hint = ": the kernel does so when memory runs out" if killed is signal.SIGKILL else ""
        return f"was killed by {killed.name} ({signal.strsignal(killed)}{hint})"


def start() -> Handle:
    """Start a worker process; it loads torch and then waits for work."""
    spawn = multiprocessing.get_context("spawn")  # a fork would share the database's descriptors
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=main, args=(theirs, os.getpid()), name="framepackd-worker")
    process.start()
    theirs.close()
    return Handle(process, ours)


def main(connection: Connection, parent: int) -> None:
    """Do one piece of work after the other until the daemon closes the connection or dies."""
    _die_with(parent)
    # The daemon decides when to stop; Ctrl-C and systemd send these to the worker as well.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _quiet_libraries()
    loaded = _Loaded()
    while True:
        try:
            work = connection.recv()
        except EOFError:
            return
        if isinstance(work, Work):  # else a stop that came when the work was over
            connection.send(_answer(work, loaded, connection))


def _answer(work: Work, loaded: "_Loaded", connection: Connection) -> Message:
    """Do the work; the one place where exceptions become failures."""
    try:
        return _generate(work, loaded, connection)
    except FramePackError as error:
        return Failed(str(error), retry=False)
    except (BrokenPipeError, ConnectionResetError):
        sys.exit(0)  # the daemon is gone
    except Exception as error:
        traceback.print_exc()
        return Failed(f"{type(error).__name__}: {error}", retry=True)


class _Loaded:
    """The engine that is loaded, kept from job to job."""

    def __init__(self) -> None:
        self._key: tuple[Any, ...] | None = None
        self._engine: Engine | None = None

    def engine(self, work: Work) -> "Engine":
        from framepack_core.engine import Engine

        key = (work.spec, work.device, work.dtype)
        if self._engine is None or key != self._key:
            self._engine = None  # first let go of the other model
            self._engine, self._key = Engine.load(work.spec, work.device, work.dtype), key
        return self._engine


def _generate(work: Work, loaded: _Loaded, connection: Connection) -> Message:
    from framepack_core.engine import Step

    clock = _PhaseClock()
    engine = loaded.engine(work)
    clock.lap("load")
    connection.send(Ready(str(engine.device)))
    conditioned = engine.encode(work.request)
    clock.lap("encode")
    work.result.mkdir(exist_ok=True)
    clip = None
    for event in engine.sample(work.request, conditioned):
        if isinstance(event, Step):
            connection.send(StepDone(event.section + 1, event.step, clock.lap("sample")))
        else:
            clip = event
            if work.save_section_frames:
                media.write_picture(work.result / f".section-{event.section}.png", event.still)
            connection.send(SectionDecoded(clock.lap("decode")))
        if connection.poll():
            connection.recv()
            return Stopped()
    assert clip is not None
    _write(work, clip.frames())
    clock.lap("write")
    return Finished(clock.seconds, _versions())


def _write(work: Work, frames: media.Frames) -> None:
    """Write the video under its name only when it is whole: decoded again, and every frame counted."""
    part = work.result / f"{files.PART_PREFIX}video.part"
    media.write_video(part, frames, size=frames.shape[1:3], crf=work.crf)
    written = media.count_frames(part)
    if written != work.frames:
        raise OSError(f"the video has {written} frames where {work.frames} were generated")
    for path in work.result.iterdir():
        files.sync_file(path)
    part.rename(work.result / ".mp4")
    files.sync_folder(work.result)
    files.sync_folder(work.result.parent)


class _PhaseClock:
    """Adds up how long each phase of a job took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, phase: str) -> float:
        now = time.monotonic()
        taken, self._last = now - self._last, now
        self.seconds[phase] = round(self.seconds.get(phase, 0.0) + taken, 3)
        return taken


def _versions() -> dict[str, str]:
    libraries = {name: importlib.metadata.version(name) for name in ("torch", "diffusers", "transformers")}
    return {"framepackd": framepack_core.__version__, **libraries}


def _die_with(parent: int) -> None:
    """Have the kernel end this process with the daemon, however that dies: two must never share a GPU."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(0)


def _quiet_libraries() -> None:
    """Keep progress bars and advice out of the daemon's log."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # models are fetched by `models download`, never on the way
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    import diffusers.utils.logging
    import transformers.utils.logging

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
