"""The tiny models on a played GPU, and a request that runs through the engine there."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from framepack_core.engine import Clip, Engine, Planner, Step
from framepack_core.memory import devices, footprint, planning
from framepack_core.memory.footprint import ItemBytes, Precision, Video
from framepack_core.memory.planning import Host, Plan
from framepack_core.networks import loading
from framepack_core.progress import Progress
from framepack_core.request import Request
from tests.conftest import tiny_spec
from tests.played.gpu import PlayedGpu
from tests.played.tensors import play

PARTS = ("transformer", "text_encoder", "text_encoder_2", "vae", "image_encoder")


def tiny_models(transformer: str = "framepack-i2v", precision: Precision = "exact") -> loading.Models:
    """Load a tiny model in the dtypes of a GPU, but the VAE in float32: CPUs are slow in half precision."""
    models = loading.load(
        tiny_spec(transformer), dtype=torch.bfloat16, encoder_dtype=torch.float16, precision=precision
    )
    models.vae.float()
    return models


def played(models: loading.Models) -> loading.Models:
    """Make a model's components playable."""
    for name in PARTS:
        play(getattr(models, name))
    return models


def planner(device: torch.device, precision: Precision = "exact", room: int | None = None) -> Planner:
    """Plan for the played card, or for the CPU, as :meth:`Engine.load` does.

    ``room``: bytes for blocks that stay, instead of the plan's own: a tiny model's would all find room.
    """

    def plan(video: Video, keep_free: int, changed: Mapping[str, int]) -> Plan:
        made = planning.make_plan(
            footprint.PUBLISHED,
            devices.card(device),
            Host.assumed(64),
            video,
            keep_free=keep_free,
            item_bytes=ItemBytes.of(2, 2, precision),
            changed=changed,
        )
        return made if room is None else replace(made, room=room)

    return plan


def picture(folder: Path, name: str = "image.png", seed: int = 0, size: tuple[int, int] = (32, 32)) -> Path:
    """Write a picture of noise."""
    pixels = np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / name)
    return folder / name


@dataclass(frozen=True)
class Run:
    """The results of a request."""

    clip: Clip | None  # the last
    steps: list[Step]
    seconds: list[float]  # of the host, by the clock, a step


def run(
    gpu: PlayedGpu,
    engine: Engine,
    request: Request,
    resume: Progress | None = None,
    *,
    leave: Callable[[Step | Clip], bool] = lambda event: False,
) -> Run:
    """Run a request as the worker does, in the phases encode, first step, step, last step and decode."""
    with gpu.during("encode"):
        conditioned = engine.encode(request)
    steps, seconds, clip, copied = [], [], None, None
    events = engine.sample(request, conditioned, resume)
    phase = "first step"  # with the section's start, and the video's
    while True:
        began = gpu.time
        with gpu.during(phase):
            event = next(events, None)
        if event is None:
            break
        with gpu.during("copies"):
            if copied is not None:
                copied.wait()
            copied = event.progress.to_host()
        if isinstance(event, Step):
            steps.append(event)
            seconds.append(gpu.time - began)
            left = event.steps - event.step
            phase = "decode" if left == 0 else "last step" if left == 1 else "step"
        else:
            clip, phase = event, "first step"
        if leave(event):
            break
    if copied is not None:
        copied.wait()
    return Run(clip, steps, seconds)
