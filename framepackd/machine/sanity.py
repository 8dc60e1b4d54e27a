"""framepackd sanity-check: makes a short video on this machine and says whether it is right.

The demo model is computed in float32 and compared with a recorded fingerprint: samples of its latents and
pixels. Other models have none; their video must be plausible: finite, neither black nor frozen nor noise,
beginning with the picture.
"""

import hashlib
import json
import math
import os
import platform
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress

from framepack_core import __version__
from framepack_core.engine import Clip, Engine, Step
from framepack_core.errors import ModelError
from framepack_core.media import pictures
from framepack_core.media.pictures import Frames, Picture
from framepack_core.memory import devices, footprint
from framepack_core.memory.footprint import Precision
from framepack_core.models.registry import BUILT_IN, ModelSpec
from framepack_core.networks.attention import choose_attention
from framepack_core.request import Request
from framepackd.settings.config import Config
from framepackd.supervisor.readiness import is_gpu_expected
from framepackd.worker.quality import Measures

if TYPE_CHECKING:
    from collections.abc import Iterator

DEMO = files("framepackd").joinpath("demo")
FINGERPRINT = DEMO.joinpath("fingerprint.json")
RECORD = "python training/record_fingerprint.py"  # records it again, in a checkout
LATENT_STRIDE, PIXEL_STRIDE = 37, 997  # prime: samples of all places, channels and frames

# How far samples may be from the fingerprint's: root mean square of the differences over their deviation.
# Measured for the latents on a CPU: other numbers of threads and another backend of attention 2e-7, other
# instructions (SSE, AVX2, AVX-512) 3e-6, AMD's CPU for Intel's 1.4e-6; one weight of a block changed 5e-4,
# float16 8e-4, one text encoder silenced 2e-3, a block left out 2e-2.
# Not measured on a GPU: there more is allowed, and still less than any of these faults takes.
LATENTS_TOLERANCE = {"cpu": 1e-4, "cuda": 2e-4}
PIXELS_TOLERANCE = 1e-2  # for the VAE's decoder alone: a few wrong pixels do not break it
STEPS = 6  # the first warms up; the rest are timed
LEAST_PSNR = 18.0  # dB, of the first frame against the picture; through the VAE alone it is 30 and more
SHOWN_FRAMES = 5

Samples = dict[str, "np.ndarray[Any, np.dtype[np.float64]]"]


@dataclass
class Report:
    """What the check found."""

    model: str
    compared: bool  # with the fingerprint
    facts: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    sheet: Picture | None = None  # the picture and some frames, side by side

    @property
    def fine(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def findings(self) -> list[tuple[bool | None, str, str]]:
        """List all findings, as ``check`` does: whether it is fine, what was checked, the finding."""
        said = "as recorded" if self.compared else "plausible"
        verdict = [(False, "video", problem) for problem in self.problems] or [(True, "video", said)]
        return [
            (None, "model", self.model),
            *((None, name, fact) for name, fact in self.facts.items()),
            *verdict,
        ]


@dataclass(frozen=True)
class Made:
    """A short video, and how long it took."""

    frames: Frames
    latents: torch.Tensor  # (1, 16, W, h, w), of its one section
    finite: bool
    step_seconds: tuple[float, ...]
    decode_seconds: float


def request(*, small: bool = False) -> Request:
    """Give the request: one section from the bundled picture, at the model's own size or ``small``."""
    size = {"width": 64, "height": 64} if small else {}
    prompt = DEMO.joinpath("lake.txt").read_text(encoding="utf-8").strip()
    return Request(image=Path(str(DEMO.joinpath("lake.png"))), prompt=prompt, seconds=1, steps=STEPS, **size)


def sanity_check(config: Config, model: str) -> Report:
    """Generate a short video, with a progress bar, and judge it.

    Raises:
        FramePackError: the model is unknown, not here or too large, or a setting is not possible here.
    """
    if model not in config.model_names():
        raise ModelError(config.unknown_model(model))
    spec = config.spec(model)
    known = is_demo(spec)
    dtype = "float32" if known else config.gpu.dtype
    precision: Precision = "exact" if known else config.gpu.precision
    asked, report = request(small=known), Report(model, compared=known)
    device = devices.choose_device(config.gpu.devices[0], gpu_expected=is_gpu_expected(model, config))
    began = time.monotonic()
    engine = Engine.load(
        spec,
        str(device),
        dtype,
        precision,
        attention=config.gpu.attention,
        video=footprint.Video.asked_for(asked, max(spec.buckets)),
        tiling=config.gpu.vae_tiling,
    )
    loaded = time.monotonic() - began
    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress, _exact_float32(when=known):
        task = progress.add_task(f"generating with {model}", total=STEPS)
        made = generate(engine, asked, lambda step: progress.update(task, completed=step.step))
    report.facts = _facts(engine, config, precision) | {
        "loading": f"{loaded:.1f} s",
        "speed": f"{median(made.step_seconds[1:]):.2f} s a step of {_size(made.frames)}, "
        f"{made.decode_seconds:.1f} s to decode {len(made.frames)} frames",
    }
    picture = pictures.crop_to(pictures.open_picture(asked.image, asked.background), made.frames.shape[1:3])
    report.problems = compare(samples(made), engine.device) if known else judge(made, picture)
    shown = [round(number * (len(made.frames) - 1) / (SHOWN_FRAMES - 1)) for number in range(SHOWN_FRAMES)]
    report.sheet = np.concatenate([picture, *(made.frames[number] for number in shown)], axis=1)
    return report


def write_sheet(report: Report, path: Path) -> None:
    """Write the picture and frames of the video, side by side, as PNG.

    Raises:
        OSError: it cannot be written.
    """
    if report.sheet is not None:
        pictures.write_picture(path, report.sheet)


def is_demo(spec: ModelSpec) -> bool:
    """Say whether a model is the bundled one, which has a fingerprint."""
    demo = BUILT_IN["demo"]
    same = (spec.transformer, spec.base, spec.image_encoder) == (
        demo.transformer,
        demo.base,
        demo.image_encoder,
    )
    return same and spec.kind == demo.kind


def generate(engine: Engine, asked: Request, told: Callable[[Step], None] = lambda _: None) -> Made:
    """Generate the short video."""
    laps = []
    for event in engine.generate(asked):
        if engine.device.type == "cuda":
            torch.cuda.synchronize(engine.device)  # else queued work would not be timed
        laps.append(time.monotonic())
        if isinstance(event, Clip):
            seconds = [later - earlier for earlier, later in pairwise(laps)]
            return Made(
                event.frames, event.progress.sampled[0], event.finite, tuple(seconds[:-1]), seconds[-1]
            )
        told(event)
    raise AssertionError("a video has a section")


@contextmanager
def _exact_float32(*, when: bool) -> "Iterator[None]":
    """Keep GPUs from rounding convolutions in float32 to TF32, as PyTorch lets them."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = before and not when
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def compare(made: Samples, device: torch.device) -> list[str]:
    """Say where samples of the demo model's video differ from the recorded ones."""
    expected = json.loads(FINGERPRINT.read_text())
    if expected["made_from"] != made_from():
        return [
            "the files of the demo model are not those that the fingerprint was recorded from: install "
            f"framepackd again or, after a change of the model, record it again: {RECORD}"
        ]
    tolerance = {"latents": LATENTS_TOLERANCE[device.type], "pixels": PIXELS_TOLERANCE}
    problems = []
    for name, found in made.items():
        wanted = np.array(expected[name])
        if found.shape != wanted.shape:
            problems.append(f"{name}: {found.size} samples and not {wanted.size}: another size of video")
            continue
        distance = float(np.sqrt(np.square(found - wanted).mean()) / wanted.std())
        if not distance <= tolerance[name]:  # nor is NaN
            problems.append(
                f"{name} differ from the recorded ones by {distance:.1e} of their deviation, and rounding "
                f"explains {tolerance[name]:.0e}: something computes wrongly here: try other versions of "
                'torch and diffusers, attention = "_native_math" or device = "cpu" under [gpu]'
            )
    return problems


def made_from() -> str:
    """Give the SHA-256 of the files of the demo model, the picture and the prompt."""
    sources = (BUILT_IN["demo"].transformer, BUILT_IN["demo"].base, BUILT_IN["demo"].image_encoder)
    kinds = ("*.safetensors", "*.json", "*.txt")
    model = {path for source in sources for kind in kinds for path in source.folder.rglob(kind)}
    digest = hashlib.sha256()
    for path in (*sorted(model), Path(str(DEMO / "lake.png")), Path(str(DEMO / "lake.txt"))):
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def samples(made: Made) -> Samples:
    """Take the samples of a video that the fingerprint holds."""
    return {
        "latents": made.latents.flatten()[::LATENT_STRIDE].double().cpu().numpy(),
        "pixels": made.frames.reshape(-1)[::PIXEL_STRIDE].astype(np.float64),
    }


def judge(made: Made, picture: Picture) -> list[str]:
    """Say what makes a video implausible; ``picture`` is what it was made from, of its size."""
    measures = Measures()
    measures.add(made.frames, finite=made.finite)
    suspect = measures.verdict(picture)
    psnr = _psnr(made.frames[0], picture)
    problems = [] if suspect is None else [suspect]
    if not bool(made.latents.isfinite().all()):
        problems.append(
            "not finite: latents hold NaN or infinity: try another dtype or precision under [gpu]"
        )
    if psnr < LEAST_PSNR:
        problems.append(
            f"the first frame is not the picture: a PSNR of {psnr:.1f} dB, and {LEAST_PSNR:.0f} is the "
            "least that is usual: framepackd models verify tells whether the files are whole"
        )
    return problems


def _psnr(one: Picture, other: Picture) -> float:
    error = float(np.square(one.astype(np.float64) - other.astype(np.float64)).mean())
    return 10 * math.log10(255**2 / error) if error else math.inf


def _facts(engine: Engine, config: Config, precision: Precision) -> dict[str, str]:
    device = engine.device
    card = devices.card(device)
    if card is None:
        hardware = f"{platform.machine()} CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    else:
        hardware = f"{card.name}, {card.total / footprint.GIB:.0f} GiB, CUDA {torch.version.cuda}"
    return {
        "hardware": hardware,
        "attention": choose_attention(config.gpu.attention, device),
        "dtype": f"{engine.models.dtype}".removeprefix("torch."),
        "precision": precision,
        "memory": engine.levels[engine.level].text,
        "versions": f"framepackd {__version__}, torch {torch.__version__}, diffusers {version('diffusers')}",
    }


def _size(frames: Frames) -> str:
    return f"{frames.shape[2]}x{frames.shape[1]}"
