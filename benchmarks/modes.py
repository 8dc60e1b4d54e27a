"""Measures the faster modes on the demo model: how close they are to the exact video, and what they compute.

The demo model says that the modes work, not how much quality the real model loses by them.
"""

import math
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch

from benchmarks import Row
from framepack_core.engine import Clip, Engine, Step
from framepack_core.media.pictures import Frames
from framepack_core.memory.footprint import Precision
from framepack_core.models.registry import BUILT_IN
from framepack_core.networks.fp8 import FP8, Fp8Linear
from framepack_core.request import Request

MODES: tuple[tuple[str, Precision], ...] = (
    ("teacache", "exact"),
    ("magcache", "exact"),
    ("none", "fp8"),
    ("none", "nf4"),
)


def rows() -> Iterator[Row]:
    """Measure against the exact run of the same request."""
    exact, _ = generate("none", "exact")
    for cache, precision in MODES:
        frames, computed = generate(cache, precision)
        name = cache if precision == "exact" else precision
        yield Row(f"{name}: PSNR to the exact video", psnr(frames, exact), None, "dB", "what it costs")
        if precision == "exact":
            yield Row(f"{name}: steps computed", computed, 1.0, "of all", "what it gains")
    with torch.no_grad():
        yield from layers()


def layers() -> Iterator[Row]:
    """Measure the error of a layer in 8 bits, against e4m3 without scales."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(256, 3072, generator=generator).to(torch.bfloat16)
    for deviation in (0.02, 0.005):  # of the weights; as initialised, a layer so wide has 0.018
        linear = torch.nn.Linear(3072, 512, bias=False, dtype=torch.bfloat16)
        linear.weight.data = (torch.randn(512, 3072, generator=generator) * deviation).to(torch.bfloat16)
        small, exact = Fp8Linear(linear), linear(inputs)
        unscaled = inputs @ linear.weight.to(FP8).to(torch.bfloat16).t()
        for what, multiplies in (("weights", False), ("weights and activations", True)):
            small.multiplies = multiplies
            name = f"fp8: a layer's error, {what} in 8 bits, weights around {deviation}"
            yield Row(name, off_by(small(inputs), exact), off_by(unscaled, exact), "", "beside e4m3 unscaled")


def off_by(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Give the relative L2 distance."""
    return float((found.float() - exact.float()).norm() / exact.float().norm())


def generate(cache: str, precision: Precision) -> tuple[Frames, float]:
    """Make two sections of the demo's picture; gives the frames and which share of the steps was computed."""
    demo = files("framepackd").joinpath("demo")
    request = Request.model_validate(
        {"image": Path(str(demo.joinpath("lake.png"))), "prompt": "pan left", "seconds": 2.4, "cache": cache}
    )
    clips, steps = [], []
    for event in Engine.load(BUILT_IN["demo"], "cpu", precision=precision).generate(request):
        if isinstance(event, Clip):
            clips.append(event.frames)
        elif isinstance(event, Step):
            steps.append(event.computed)
    return np.concatenate(clips), sum(steps) / len(steps)


def psnr(frames: Frames, reference: Frames) -> float:
    """Compare 8-bit pictures, in dB."""
    error = np.mean((frames.astype(np.float64) - reference) ** 2)
    return 10 * math.log10(255**2 / error) if error else math.inf


if __name__ == "__main__":
    for row in rows():
        print(row)
