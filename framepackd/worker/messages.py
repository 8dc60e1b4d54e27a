"""The messages between the daemon and its worker. No torch here."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from framepack_core.errors import FreshProcessError
from framepack_core.memory.footprint import Tiling
from framepack_core.models.registry import ModelSpec
from framepack_core.request import Cut, Request
from framepackd.worker import other_device
from framepackd.worker.source_video import Continued

if TYPE_CHECKING:
    pass

if TYPE_CHECKING:
    from framepack_core.networks.quantization import Precision


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


def leaves_after(answer: Message) -> bool:
    """Say whether the worker ends after an answer: what it has loaded, or the device, may be broken."""
    match answer:
        case Again() | Failed(retry=True) | Blocked(device=True):  # CUDA looks for devices once a process
            return True
    return False


class AheadError(FreshProcessError):
    """The device broke while the inputs of a job were encoded ahead of its time."""

    def __init__(self, job_id: str, why: str) -> None:
        """Say which job's, and how it broke."""
        super().__init__(f"the device failed while job {job_id} was encoded ahead of its time ({why})")
        self.job_id = job_id
