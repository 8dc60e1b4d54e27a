"""Times two sections from noise to a playable file: by our engine and writer, and by a loop like FramePack's.

The plain loop calls diffusers' forward with everything in it at every step, decodes all latents that sections
share, keeps all pixels and encodes the whole history anew after each section.

``python -m benchmarks section``: on a GPU, with random weights at the full shape, all of them on the card;
``FRAMEPACKD_BENCHMARK=tiny`` runs it small, on the CPU if there is no GPU, only to check that it runs.
"""

import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from diffusers import AutoencoderKLHunyuanVideo
from PIL import Image
from torch import nn
from torch.autograd import DeviceType  # type: ignore[attr-defined] # where its profiler has it from
from torch.profiler import ProfilerActivity, profile

from benchmarks import Row
from benchmarks.full_shape import SMALL, config
from benchmarks.gpu import (
    DEVICE,
    DTYPE,
    HEIGHT,
    WIDTH,
    WINDOW,
    Step,
    random_weights,
    release,
    synchronize,
)
from benchmarks.writer import encode_whole, example_work
from framepack_core import sections
from framepack_core.conditioning import Conditioning
from framepack_core.engine import Engine
from framepack_core.memory import devices, footprint, planning
from framepack_core.memory.footprint import MemoryLevel
from framepack_core.models.registry import BUILT_IN
from framepack_core.networks import loading, vae
from framepack_core.sampling.unipc import Denoiser, flow_sigmas, sample_unipc, schedule_mu
from framepackd.worker import messages
from framepackd.worker.generation import Generation

SECTIONS, STEPS = 2, 3 if SMALL else 25


def rows() -> Iterator[Row]:
    """Measure; nothing where there is no GPU."""
    if DEVICE.type != "cuda" and not SMALL:
        return
    name = f"{SECTIONS} sections of {STEPS} steps, from the first step to the video"
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        step = Step()
        decoder = _decoder()
        theirs = plain(step, decoder, Path(folder))
        engine = Engine(_models(step, decoder), DEVICE, _plan, pinnable=False)
        engine.prepare(footprint.Video(HEIGHT, WIDTH))
        conditioned = Conditioning(
            positive=step.text,
            negative=None,
            image_embeds=step.image,
            start_latents=torch.randn(1, 16, 1, HEIGHT // 8, WIDTH // 8),
        )
        ours, _ = generated(engine, conditioned, Path(folder) / "timed")
        yield Row(name, ours, theirs, "s", "all savings together")
        if DEVICE.type == "cuda":
            taken, idle = generated(engine, conditioned, Path(folder) / "profiled", profiled=True)
            yield Row("device idle meanwhile", 100 * idle / taken, None, "%", "nothing waits for the disk")
    del engine, step, decoder
    release()


def _decoder() -> Any:
    with torch.device("meta"):
        decoder = AutoencoderKLHunyuanVideo(**config("vae")).to(DTYPE)
    return random_weights(decoder, DEVICE).to(torch.float16 if DEVICE.type == "cuda" else torch.float32)


def _models(step: Step, decoder: nn.Module) -> loading.Models:
    """Give the components that the sampling and the decoding use; the others are not called."""
    unused = cast("Any", nn.Linear(1, 1))
    others = (
        "text_encoder",
        "text_encoder_2",
        "tokenizer",
        "tokenizer_2",
        "image_encoder",
        "image_processor",
    )
    return loading.Models(
        spec=BUILT_IN["framepack"],
        transformer=step.transformer,
        vae=cast("Any", decoder),
        dtype=DTYPE,
        **dict.fromkeys(others, unused),
    )


def _plan(*_: object) -> planning.Plan:
    level = MemoryLevel(256, "all")
    return planning.Plan(
        level=0,
        levels=(level,),
        pinned=False,
        pinnable=False,
        places={},
        vram=0,
        ram=0,
        mapped=0,
        speed="",
    )


class _Engines:
    """Gives the one engine, with its inputs encoded."""

    compiled = False

    def __init__(self, engine: Engine, conditioned: Conditioning) -> None:
        self._engine, self._conditioned = engine, conditioned

    def get(self, *_: object) -> Engine:
        return self._engine

    def model_digest(self, *_: object) -> str:
        return "weights that were drawn"

    def encode(self, *_: object) -> Conditioning:
        return self._conditioned


class _Daemon:
    """A connection that notes when the first step is done."""

    def __init__(self) -> None:
        self.first_step: float | None = None

    def poll(self) -> bool:
        return False

    def send(self, message: messages.Message) -> None:
        if isinstance(message, messages.StepDone) and self.first_step is None:
            synchronize()
            self.first_step = time.perf_counter()


def generated(
    engine: Engine, conditioned: Conditioning, folder: Path, *, profiled: bool = False
) -> tuple[float, float]:
    """Have the worker's own code generate the video; gives its seconds, and those the device idled."""
    folder.mkdir()
    picture = folder / "picture.png"
    noise = np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    Image.fromarray(noise).save(picture)
    work = example_work(folder, "framepack", SECTIONS)
    seconds = SECTIONS * WINDOW * 4 / sections.FPS
    request = work.request.model_copy(
        update={
            "image": picture,
            "seconds": seconds,
            "steps": STEPS,
            "latent_window_size": WINDOW,
            "height": HEIGHT,
            "width": WIDTH,
        }
    )
    frames = sections.frame_count(SECTIONS, WINDOW)
    work = replace(
        work, request=request, size=(HEIGHT, WIDTH), frames=frames, device=DEVICE.type, compile=False
    )
    daemon: Any = _Daemon()
    engines: Any = _Engines(engine, conditioned)
    watching = profile(activities=[ProfilerActivity.CUDA]) if profiled else nullcontext()
    with watching as profiler:
        Generation(work, engines, daemon).run()
        synchronize()
    taken = time.perf_counter() - daemon.first_step
    return taken, taken - busy_seconds(profiler) * (1 - 1 / (SECTIONS * STEPS)) if profiled else 0.0


def busy_seconds(profiler: Any) -> float:
    """Add up the time in which at least one kernel or copy ran."""
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == DeviceType.CUDA
    )
    busy, until = 0.0, float("-inf")
    for start, end in spans:
        busy += max(end - max(start, until), 0)
        until = max(until, end)
    return busy / 1e6


def plain(step: Step, decoder: Any, folder: Path) -> float:
    """Make the same video as FramePack's own loop does; gives the seconds it took after the first step."""
    devices.set_tiles(decoder, 256)
    latents_of = torch.randn(1, 16, WINDOW, HEIGHT // 8, WIDTH // 8)
    sigmas = flow_sigmas(STEPS, schedule_mu(WINDOW * (HEIGHT // 8) * (WIDTH // 8) // 4))
    history_pixels: torch.Tensor | None = None
    history: list[torch.Tensor] = []
    began: float | None = None

    def velocity(latents: torch.Tensor, *_: object) -> torch.Tensor:
        step.latents = latents.to(DTYPE)
        return step.whole().float()

    for _ in range(SECTIONS):
        denoiser = Denoiser(velocity, sigmas, dtype=DTYPE)
        for solver in sample_unipc(denoiser, latents_of.to(DEVICE), sigmas, None):
            made = solver.denoised[-1]
            if began is None:
                synchronize()
                began = time.perf_counter()
        history.insert(0, made.cpu())
        decoded = vae.decode(torch.cat(history[:2], dim=2), decoder).cpu()
        if history_pixels is None:
            history_pixels = decoded
        else:
            history_pixels = vae.blend(decoded, history_pixels, 4 * WINDOW - 3)
        pixels = history_pixels.float().clamp(-1, 1) * 127.5 + 127.5
        encode_whole(folder / "plain.mp4", pixels.to(torch.uint8)[0].permute(1, 2, 3, 0).contiguous().numpy())
    assert began is not None
    return time.perf_counter() - began


if __name__ == "__main__":
    for row in rows():
        print(row)
