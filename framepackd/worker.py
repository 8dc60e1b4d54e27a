"""The worker process, and what it and the daemon say to each other.

A process of its own, so that a crash of the model's code takes neither the daemon nor the queue with it.
Only here is torch imported, and only inside functions: the daemon imports this module for its messages.
"""

import ctypes
import errno
import logging
import multiprocessing
import multiprocessing.process
import os
import signal
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from framepack_core import before_torch
from framepack_core.errors import DeviceError, FramePackError, FreshProcessError
from framepack_core.footprint import Tiling
from framepack_core.models import ModelSpec
from framepack_core.prompts import Cut
from framepack_core.request import Request
from framepackd import other_device
from framepackd.database import Job
from framepackd.source_video import Continued

if TYPE_CHECKING:
    from framepack_core.precision import Precision
    from framepackd.generation import Engines

log = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1
# The daemon decides when to stop; Ctrl-C and systemd send these to the worker as well.
FOR_THE_DAEMON = (signal.SIGINT, signal.SIGTERM)
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)


@dataclass(frozen=True)
class Work:
    """What the worker is told to do."""

    job_id: str
    request: Request
    spec: ModelSpec
    fingerprint: str  # of pictures, prompt and settings
    result: Path  # folder to write the video and what goes with it to
    checkpoint: Path  # folder for what is needed to go on after a crash
    preview: Path  # file to write what exists of the video to
    sections: int
    frames: int
    size: tuple[int, int]  # height, width
    crf: int
    save_section_frames: bool
    keep_latents: bool
    device: str
    dtype: str
    precision: "Precision"
    compile_cache: Path  # folder in which what is compiled is kept
    rungs: Mapping[str, int]  # how far down the ladder of memory.py other jobs had to go
    attention: str = "auto"
    compile: bool | Literal["auto"] = "auto"
    vae_tiling: Tiling = "auto"
    uncompiled: Mapping[str, str] = field(default_factory=dict)  # why compiling failed, by its conditions
    gpu_expected: bool = False  # "auto" is a GPU: the CPU would take days
    keep_free: int = 0  # bytes of the device to leave to others
    keep_only: bool = False  # generate no more, write what exists
    preview_decoder: Path | None = None  # weights of a tiny decoder
    strip: bool = False  # make a picture of the video's frames for the results page
    continued: Continued | None = None  # a video that becomes longer
    tags: Mapping[str, str] = field(default_factory=dict)  # to be written into the video
    following: tuple[Request, ...] = ()  # of a chain: the clips after the first, each as long
    ahead: bool = True  # its inputs may be encoded while something else is sampled

    @property
    def clips(self) -> tuple[Request, ...]:
        """All clips, in the order of time; the video is their frames, a shared one only once."""
        return self.request, *self.following


@dataclass(frozen=True)
class Leave:
    """The worker is to leave its job at the next step; ``keep``: and to write what exists as a video."""

    keep: bool = False


@dataclass(frozen=True)
class Next:
    """What comes after the job at hand, as far as is known: its inputs can be encoded between sections."""

    work: Work | None


@dataclass(frozen=True)
class Resumed:
    """So many steps of the job were found done."""

    steps: int


@dataclass(frozen=True)
class SetAside:
    """A checkpoint cannot be used, or not all of it: says why, how the job goes on, and where it is kept."""

    text: str


@dataclass(frozen=True)
class PromptsCut:
    """Prompts of the job are too long for a text encoder."""

    cuts: tuple[Cut, ...]


@dataclass(frozen=True)
class Ready:
    """The model is loaded, or the inputs are encoded."""

    device: str
    hardware: str  # the device with its driver, in words


@dataclass(frozen=True)
class Lowered:
    """The device had too little memory; the job goes on further down the ladder."""

    key: str  # what this holds for: device, model, size
    rung: int
    text: str


@dataclass(frozen=True)
class Uncompiled:
    """Compiling failed; the job goes on without."""

    key: str  # what this holds for: see compiling.conditions
    reason: str


@dataclass(frozen=True)
class StepDone:
    """A sampling step is done; sections count from 1."""

    section: int
    step: int
    seconds: float


@dataclass(frozen=True)
class SectionDecoded:
    """A section is decoded; sections count from 1."""

    section: int
    seconds: float


@dataclass(frozen=True)
class Finished:
    """The video is written, checked and durable; or what there was of it, for a wish to leave and keep."""

    timings: dict[str, float]
    versions: dict[str, str]
    computation: dict[str, str | bool]  # how it was computed, where there is a choice
    quality: str | None  # what is suspect about the pictures
    loras: tuple[dict[str, int], ...] = ()  # how many keys of each matched; none if nothing was generated
    encoded_anew: bool = False  # the part that stays of a video that was gone on with


@dataclass(frozen=True)
class Stopped:
    """The job was left because the worker was told so; it can be resumed."""


@dataclass(frozen=True)
class Failed:
    """The job cannot be done, or could not this time."""

    error: str
    retry: bool
    device: bool = False  # the device failed, whatever the job is


@dataclass(frozen=True)
class Again:
    """The job is to go on in another process, which this one cannot do; no fault of the job."""

    reason: str
    not_ahead: str | None = None  # a job whose inputs are not to be encoded ahead of its time any more


@dataclass(frozen=True)
class Blocked:
    """The disk is full or fails, or the device is not there: no fault of the job, which can go on after."""

    reason: str
    device: bool = False


@dataclass(frozen=True)
class Waits:
    """What was made of the job is of the other type of device: a person decides, others can run meanwhile."""

    reason: str
    made_on: other_device.Type


Message = (
    Resumed
    | SetAside
    | PromptsCut
    | Ready
    | Lowered
    | Uncompiled
    | StepDone
    | SectionDecoded
    | Finished
    | Stopped
    | Blocked
    | Waits
    | Failed
    | Again
)


class AheadError(FreshProcessError):
    """The device broke while the inputs of a job were encoded ahead of its time."""

    def __init__(self, job_id: str, why: str) -> None:
        """Say which job's, and how it broke."""
        super().__init__(f"the device failed while job {job_id} was encoded ahead of its time ({why})")
        self.job_id = job_id


def leaves_after(answer: Message) -> bool:
    """Say whether the worker ends after an answer: what it has loaded, or the device, may be broken."""
    match answer:
        case Again() | Failed(retry=True) | Blocked(device=True):  # CUDA looks for devices once a process
            return True
    return False


@dataclass
class Handle:
    """The daemon's end: the process, the connection to it, and the job it is on."""

    process: multiprocessing.process.BaseProcess
    connection: Connection
    job: Job | None = None
    told_next: str | None = None  # the job that it knows to come next
    idle_since: float = field(default_factory=time.monotonic)
    stop_sent: float | None = None
    quiet: float = 0.0  # seconds since the last sign of life
    awaited: str = "start"  # what the next sign is of: start, step, decode or end
    slowest: dict[str, float] = field(default_factory=dict)  # of what was awaited, in seconds
    worked: bool = False  # it has done a step: the device computes
    hung: str | None = None  # why it was ended, at the cost of an attempt
    ended: str | None = None  # why it was ended, through no fault of the job

    def manner_of_death(self) -> str:
        """Say in words how the process ended."""
        if self.hung or self.ended:
            return str(self.hung or self.ended)
        code = self.process.exitcode or 0
        if code >= 0:
            return f"ended by itself with exit code {code}"
        killed = signal.Signals(-code)
        hint = ": the kernel does so when memory runs out" if killed is signal.SIGKILL else ""
        return f"was killed by {killed.name} ({signal.strsignal(killed)}{hint})"


def start(device: str) -> Handle:
    """Start a worker process; it loads torch, to compute on a device, and then waits for work."""
    spawn = multiprocessing.get_context("spawn")  # a fork would share the database's descriptors
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=main, args=(theirs, os.getpid(), device), name="framepackd-worker")
    # Inherited, until the worker is so far that it ignores them: else one that comes too early ends it.
    resource_tracker.ensure_running()  # which would let them through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, FOR_THE_DAEMON)
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    theirs.close()
    return Handle(process, ours)


def main(connection: Connection, parent: int, device: str) -> None:
    """Do one piece of work after the other until the daemon closes the connection or dies."""
    _die_with(parent)
    for number in FOR_THE_DAEMON:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FOR_THE_DAEMON)
    before_torch.set_up(device)
    quiet_libraries()
    from framepackd.generation import Engines

    engines = Engines()
    while True:
        try:
            work = connection.recv()
        except (EOFError, ConnectionResetError):  # the daemon is gone, perhaps in the middle of a word
            return
        if isinstance(work, Work):  # else a word about work that is over
            answer = _answer(work, engines, connection)
            connection.send(answer)
            if leaves_after(answer):
                return


def _answer(work: Work, engines: "Engines", connection: Connection) -> Message:
    """Do the work; the one place where exceptions become failures."""
    from framepack_core.device_errors import Verdict, judge
    from framepackd.generation import Generation

    try:
        return Generation(work, engines, connection).run()
    except DeviceError as error:
        return Blocked(str(error), device=True)
    except FramePackError as error:
        return Failed(str(error), retry=False)
    except (BrokenPipeError, ConnectionResetError):
        sys.exit(0)  # the daemon is gone
    except AheadError as error:
        return Again(str(error), not_ahead=error.job_id)
    except FreshProcessError as error:
        return Again(str(error))
    except other_device.OtherDeviceError as error:
        return Waits(str(error), error.made_on)
    except Exception as error:
        traceback.print_exc()
        if getattr(error, "errno", None) in DISK_ERRORS:  # FFmpeg's errors are not all OSErrors
            return Blocked(f"{work.result.parent}: {error}")
        broken = judge(error) is not Verdict.NOTHING
        return Failed(f"{type(error).__name__}: {error}", retry=True, device=broken)


def _die_with(parent: int) -> None:
    """Have the kernel end this process with the daemon, however that dies: two must never share a GPU."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(0)


def quiet_libraries() -> None:
    """Keep progress bars and advice out of the daemon's log."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # models are fetched by `models download`, never on the way
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    import diffusers.utils.logging
    import transformers.utils.logging

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it misses a package that nothing here needs
