"""Rows of first light: the recorded cases of the reference, computed on this machine's device.

The limits in float32 are ten times those that hold on the CPU (``tests/core/test_parity.py``): another device
adds up in another order. Those in bfloat16 are two to three times what a CPU is off by: 1.6 % in the
transformer, 16 to 24 % in whole videos, where random weights let small differences grow.
"""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.first_light import Figure
from benchmarks.full_shape import SMALL
from framepack_core.engine import Clip, Engine
from framepack_core.memory import devices
from framepack_core.networks import encoders, loading, vae
from framepack_core.networks.transformer import split_transformer
from tests.golden import Case, group, worst
from tests.golden.replay import (
    conditioned,
    history_of,
    recorded_frequencies,
    request_of,
    tiny_spec,
    velocity_of,
)

MODELS = ("framepack-i2v", "framepack-f1")
Error = Callable[[torch.Tensor, torch.Tensor], float]


@dataclass(frozen=True)
class Limits:
    """How far off a part may be."""

    transformer: float
    text: float
    picture: float
    decoding: float
    video: float
    skipping: float  # a video with TeaCache, which may skip other steps


EXACT = Limits(1e-4, 1e-4, 1e-4, 1e-4, 2e-3, 1e-2)
ROUNDED = Limits(0.05, 0.05, 0.05, 0.05, 0.5, 0.5)


def float32() -> Iterator[Figure]:
    """Compute in float32, not in TF32; largest differences."""
    switches: list[Any] = [torch.backends.cuda.matmul, getattr(torch.backends.cudnn, "conv")]  # noqa: B009 # untyped
    before = [switch.fp32_precision for switch in switches]
    for switch in switches:
        switch.fp32_precision = "ieee"
    try:
        yield from parity("float32", worst, EXACT, "largest difference")
    finally:
        for switch, precision in zip(switches, before, strict=True):
            switch.fp32_precision = precision


def bfloat16() -> Iterator[Figure]:
    """Compute in the dtypes that videos are made in; differences beside what was recorded."""
    yield from parity("bfloat16", relative, ROUNDED, "difference / recorded")


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Give the norm of the difference over that of what was recorded."""
    assert ours.shape == theirs.shape
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


def cases(letter: str, small: int) -> list[Case]:
    """Give a group's cases; the first few where all is small."""
    found = group(letter)
    return found[:small] if SMALL else found


def parity(dtype: str, error: Error, limits: Limits, says: str) -> Iterator[Figure]:
    """Compare part by part."""

    def compared(name: str, errors: list[float], limit: float) -> Figure:
        top = max(errors)
        return Figure(f"{name}, {len(errors)} cases", top, baseline=limit, says=says, good=top <= limit)

    device = devices.choose_device("auto")
    dtypes = devices.choose_dtypes(device, dtype)
    loaded = {name: Loaded(name, dtypes, device) for name in MODELS}
    components = loaded[MODELS[0]].models
    with recorded_frequencies():
        errors = [
            error(loaded[case.params["model"]].velocity(case).float().cpu(), case.tensors()["output"])
            for case in cases("a", 4)
        ]
        yield compared("transformer", errors, limits.transformer)
    yield compared(
        "prompts", [_prompt(case, components, error) for case in cases("d_prompt", 2)], limits.text
    )
    yield compared("pictures", [_picture(case, components, error) for case in cases("f", 1)], limits.picture)
    yield compared(
        "decoding", [_decoded(case, components, error) for case in cases("e10", 2)], limits.decoding
    )
    engines = {name: Engine.load(tiny_spec(name), device=device.type, dtype=dtype) for name in MODELS}
    with recorded_frequencies(), tempfile.TemporaryDirectory() as folder:
        plain: list[float] = []
        skipping: list[float] = []
        for case in cases("h", 1 if dtype == "float32" else 0):
            error_of = _video(case, engines[case.params["model"]], error, Path(folder))
            (skipping if case.params["use_teacache"] else plain).append(error_of)
    for name, found, limit in (
        ("whole videos", plain, limits.video),
        ("whole videos with TeaCache", skipping, limits.skipping),
    ):
        if found:
            yield compared(f"{name}, latents", found, limit)


class Loaded:
    """A tiny model's components, all of them on the device."""

    def __init__(self, name: str, dtypes: tuple[torch.dtype, torch.dtype], device: torch.device) -> None:
        """Load it."""
        self.models: Any = loading.load(tiny_spec(name), dtype=dtypes[0], encoder_dtype=dtypes[1])
        for part in (self.models.text_encoder, self.models.text_encoder_2, self.models.image_encoder):
            part.to(device)
        self.models.vae.to(device)
        self._core, self._embedders = split_transformer(self.models.transformer)
        self._core.to(device)
        self._embedders.to(device)

    def velocity(self, case: Case) -> torch.Tensor:
        """Give what the transformer answers in a case."""
        return velocity_of(case, self._core, self._embedders)


def _prompt(case: Case, models: Any, error: Error) -> float:
    text = encoders.encode_prompt(
        case.params["prompt"],
        models.text_encoder,
        models.tokenizer,
        models.text_encoder_2,
        models.tokenizer_2,
        next(models.vae.parameters()).device,
    )
    t = case.tensors()
    embeds = error(text.prompt_embeds.float(), t["llama_vec_512"])
    return max(embeds, error(text.pooled_prompt_embeds.float(), t["clip_l_pooler"]))


def _picture(case: Case, models: Any, error: Error) -> float:
    t = case.tensors()
    embeds = encoders.encode_image(t["image"].numpy(), models.image_encoder, models.image_processor)
    return error(embeds.float(), t["last_hidden_state"])


def _decoded(case: Case, models: Any, error: Error) -> float:
    t = case.tensors()
    pixels = vae.decode(t["latent"], models.vae).float().cpu()
    if "pixels" in t:
        return error(pixels, t["pixels"])
    return error(pixels[..., 1::4, 1::4], t["pixels_1_4"])


def _video(case: Case, engine: Engine, error: Error, folder: Path) -> float:
    t = case.tensors()
    request = request_of(case, t, folder)
    *_, clip = engine.sample(request, conditioned(case, t, engine, request))
    assert isinstance(clip, Clip)
    return error(history_of(clip, t), t["history_latents"])
