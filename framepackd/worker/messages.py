"""The messages between the daemon and its worker, without torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from framepack_core.errors import FreshProcessError
from framepack_core.memory.footprint import Precision, Tiling
from framepack_core.models.registry import ModelSpec
from framepack_core.request import Cut, Request
from framepackd.worker.source_video import Continued


@dataclass(frozen=True)
class Work:
    """A job, as the daemon sends it to the worker."""

    job_id: str
    request: Request
    spec: ModelSpec
    fingerprint: str  # of pictures, prompt and settings
    result: Path  # folder to write the video and what goes with it to
    checkpoint: Path  # folder for what a resume needs
    preview: Path  # file for what exists of the video
    sections: int
    frames: int
    size: tuple[int, int]  # height, width
    crf: int
    save_section_frames: bool
    keep_latents: bool
    device: str
    dtype: str
    precision: Precision
    compile_cache: Path  # folder for compiled kernels
    load_lock: Path  # file that a worker locks while it loads a model
    levels: Mapping[str, int]  # the memory level that other jobs needed, by card or its kind, model and size
    attention: str = "auto"
    compile: bool | Literal["auto"] = "auto"
    vae_tiling: Tiling = "auto"
    uncompiled: Mapping[str, str] = field(default_factory=dict)  # why compiling failed, by its conditions
    gpu_expected: bool = False  # "auto" is a GPU: the CPU would take days
    keep_free: int = 0  # bytes of the device to leave to others
    keep_only: bool = False  # generate no more, write what exists
    preview_decoder: Path | None = None  # weights of a tiny decoder
    filmstrip: bool = False  # make a picture of the video's frames for the results page
    continued: Continued | None = None  # the video that the job extends
    tags: Mapping[str, str] = field(default_factory=dict)  # metadata of the video
    following: tuple[Request, ...] = ()  # of a chain: the clips after the first, each as long
    elsewhere: frozenset[str] = frozenset()  # the cards of other devices, which can resume what they began
    moves: bool = False  # it has waited for its card long enough, and begins anew on this one
    helps: bool = False  # another worker computes the job, this one makes clips of it
    ahead: bool = True  # its inputs may be encoded while something else is sampled
    mirrored: bool = False  # the worker tells what it does in the work folder: another machine mirrors it

    @property
    def clips(self) -> tuple[Request, ...]:
        """All clips, in the order of time; a frame that two clips share is in the video once."""
        return self.request, *self.following


@dataclass(frozen=True)
class Leave:
    """The worker shall leave its job at the next step and, with ``keep``, write what exists as a video."""

    keep: bool = False


@dataclass(frozen=True)
class Next:
    """The job after the current one, if known: its inputs can be encoded between sections."""

    work: Work | None


class Message:
    """What the worker tells the daemon about its job."""


@dataclass(frozen=True)
class Resumed(Message):
    """So many steps of the job are already done."""

    steps: int
    clips: tuple[int, ...] = ()  # of them of each clip, if there are several


@dataclass(frozen=True)
class SetAside(Message):
    """A checkpoint cannot be used, or not all of it: why, how the job continues, where the rest is kept."""

    text: str


@dataclass(frozen=True)
class PromptsCut(Message):
    """Prompts of the job are too long for a text encoder."""

    cuts: tuple[Cut, ...]


@dataclass(frozen=True)
class Ready(Message):
    """The model is loaded, or the inputs are encoded."""

    device: str
    hardware: str  # the device with its driver, in words
    card: str  # the name of the card, or cpu


@dataclass(frozen=True)
class Lowered(Message):
    """The device had too little memory; the job continues at a lower memory level."""

    key: str  # card, model and size
    level: int
    text: str


@dataclass(frozen=True)
class Uncompiled(Message):
    """Compiling failed; the job continues without."""

    key: str  # see compiling.conditions
    reason: str


@dataclass(frozen=True)
class StepDone(Message):
    """A sampling step is done; sections count from 1."""

    section: int
    step: int
    seconds: float


@dataclass(frozen=True)
class SectionDecoded(Message):
    """A section is decoded; sections count from 1."""

    section: int
    seconds: float


@dataclass(frozen=True)
class Finished(Message):
    """The video is written, checked and durable; after Leave(keep=True), as much of it as existed."""

    timings: dict[str, float]
    versions: dict[str, str]
    computation: dict[str, str | bool]  # how it was computed, where there is a choice
    quality: str | None  # what looks wrong with the video
    loras: tuple[dict[str, int], ...] = ()  # matched keys of each; empty if nothing was generated
    encoded_anew: bool = False  # the part that stays of an extended video


@dataclass(frozen=True)
class WaitsForClip(Message):
    """Other workers make all clips that are missing; repeated as a sign of life."""


@dataclass(frozen=True)
class Helped(Message):
    """No clip is left that this worker could make."""


@dataclass(frozen=True)
class Sampled(Message):
    """All is sampled and decoded: the device is free, and the video is written beside the next job."""


@dataclass(frozen=True)
class Written(Message):
    """How the job that was sampled before has ended, while another one may be computed."""

    reply: Message


@dataclass(frozen=True)
class Stopped(Message):
    """The worker left the job as the daemon asked; it can be resumed."""


@dataclass(frozen=True)
class Failed(Message):
    """The job cannot be done, or could not this time."""

    error: str
    retry: bool
    device: bool = False  # the device failed, not the job


@dataclass(frozen=True)
class Again(Message):
    """The job must continue in another process; no fault of the job."""

    reason: str
    not_ahead: str | None = None  # a job whose inputs must not be encoded ahead again


@dataclass(frozen=True)
class Blocked(Message):
    """The disk is full or fails, or the device is missing: no fault of the job, which resumes later."""

    reason: str
    device: bool = False


@dataclass(frozen=True)
class Waits(Message):
    """The job's checkpoint is of another device, which alone can resume it; other jobs can run."""

    reason: str
    made_on: str  # the name of its card, or cpu
    here: str


@dataclass(frozen=True)
class Kept(Message):
    """A part of a file that the worker has written; several messages for a large file, in order."""

    job_id: str
    name: str  # below the work folder
    size: int  # of the whole file
    offset: int  # of this part
    content: bytes
    durable: bool = True  # False: a preview, which a crash may lose


@dataclass(frozen=True)
class Clear(Message):
    """The worker has removed a file of the job, or would have if it were there."""

    job_id: str
    name: str  # below the work folder


@dataclass(frozen=True)
class Moved(Message):
    """The worker has renamed a file or a folder of the job; durable."""

    job_id: str
    source: str  # below the work folder
    target: str


@dataclass(frozen=True)
class Hello(Message):
    """A card of another machine is reached, and can begin a job."""

    versions: dict[str, str]  # of framepackd and the libraries that compute and write
    device: str  # as the node names it: cpu, cuda:0
    hardware: str  # in words
    card: str  # the name of the card, or cpu
    models: tuple[str, ...]  # the names of those whose files are there


@dataclass(frozen=True)
class Died(Message):
    """The worker process on another machine has ended, and how; as if it had been this machine's own."""

    manner: str


@dataclass(frozen=True)
class Lost(Message):
    """Another machine, or the way to it, is lost: no job's fault."""

    reason: str


def leaves_after(answer: Message) -> bool:
    """Say whether the worker ends after an answer: its state or the device may be broken."""
    match answer:
        case Again() | Failed(retry=True) | Blocked(device=True):  # CUDA looks for devices once a process
            return True
    return False


class AheadError(FreshProcessError):
    """The device broke while a job's inputs were encoded ahead."""

    def __init__(self, job_id: str, why: str) -> None:
        """Name the job, and how the device broke."""
        super().__init__(f"the device failed while job {job_id} was encoded ahead of its time ({why})")
        self.job_id = job_id
