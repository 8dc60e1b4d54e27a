"""Recorded cases, run by our code wherever an engine computes."""

import hashlib
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from diffusers.models import embeddings
from PIL import Image

from framepack_core.conditioning import Conditioning
from framepack_core.engine import Clip, Engine
from framepack_core.history import HistoryContext
from framepack_core.models.registry import ModelSpec, Source
from framepack_core.networks.encoders import TextConditioning
from framepack_core.networks.transformer import Core, Embedders
from framepack_core.request import Request
from framepack_core.sections import HISTORY_FRAMES, Kind, Section
from tests.golden import TINY_MODELS, Case

KINDS: dict[str, Kind] = {"framepack-i2v": "framepack", "framepack-f1": "f1"}
Tensors = dict[str, torch.Tensor]
# Of the 128 frequencies of the machine that recorded, those that are one bit off: see embed_timestep.
ONE_BIT_OFF = (13, 44)


def tiny_spec(transformer: str = "framepack-i2v") -> ModelSpec:
    """Name one of the tiny models as a config would: local folders."""
    return ModelSpec(
        name=transformer,
        kind=KINDS[transformer],
        transformer=Source(str(TINY_MODELS / transformer)),
        base=Source(str(TINY_MODELS / "hunyuanvideo")),
        image_encoder=Source(str(TINY_MODELS / "flux_redux")),
    )


def recorded_frequencies(off: tuple[int, ...] = ONE_BIT_OFF) -> AbstractContextManager[object]:
    """Have the timestep embedded with the frequencies of the machine that recorded.

    A CPU's ``exp`` may be off in the last bit, and each has its own. Times a guidance of 10000 that moves
    the transformer's output by as much as 4e-4. On that machine 2 of the 128 were not rounded correctly.
    """
    embed: Callable[..., torch.Tensor] = partial(embed_timestep, off=off)
    return mock.patch.object(embeddings, "get_timestep_embedding", embed)


def embed_timestep(
    timestep: torch.Tensor, dim: int, *, flip_sin_to_cos: bool, off: tuple[int, ...], **_: object
) -> torch.Tensor:
    """Give its embedding (1, 256), with frequencies rounded correctly but for those that are one bit off."""
    assert (dim, flip_sin_to_cos) == (256, True)
    exponents = -math.log(10000) * torch.arange(128, dtype=torch.float32) / 128
    frequencies = torch.exp(exponents.double()).float()
    for place in off:
        frequencies[place] = torch.nextafter(frequencies[place], torch.tensor(1.0))
    angles = timestep[:, None].float() * frequencies.to(timestep.device)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def nothing_to_move(_: torch.nn.Module) -> nullcontext[None]:
    return nullcontext()


def section_and_history(t: Tensors) -> tuple[Section, HistoryContext]:
    """Give what a section looks back on, as recorded."""

    def indices(name: str) -> tuple[int, ...]:
        return tuple(t[f"{name}_indices"][0].tolist())

    earlier, later = indices("clean_latent")
    section = Section(
        index=0,
        padding=None,
        is_last=False,
        indices_latents=indices("latent"),
        indices_latents_clean=(earlier, later),
        indices_latents_history_2x=indices("clean_latent_2x"),
        indices_latents_history_4x=indices("clean_latent_4x"),
    )
    return section, HistoryContext(t["clean_latents"], t["clean_latents_2x"], t["clean_latents_4x"])


@torch.inference_mode()
def velocity_of(case: Case, core: Core, embedders: Embedders) -> torch.Tensor:
    """Give what the transformer answers in a case of group a, where both halves of it are."""
    t, weight = case.tensors(), core.x_embedder.proj.weight

    def there(name: str) -> torch.Tensor:
        return t[name].to(weight.device, weight.dtype)

    mask = t["encoder_attention_mask"].bool().to(weight.device)
    text = TextConditioning(there("encoder_hidden_states"), mask, there("pooled_projections"))
    steps, scale = (t[name].to(weight.device) for name in ("timestep", "guidance"))
    precomputed = embedders.precompute(text, there("image_embeddings"), steps, scale, nothing_to_move)
    section, history = section_and_history(t)
    context = core.history_tokens(
        section, HistoryContext(*(part.to(weight.device, weight.dtype) for part in history))
    )
    velocity: torch.Tensor = core(there("hidden_states"), precomputed, 0, context, None)
    return velocity


def sha256(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def save(path: Path, picture: torch.Tensor) -> Path:
    Image.fromarray(picture.numpy()).save(path)
    return path


def request_of(case: Case, t: Tensors, folder: Path) -> Request:
    """Give the request of a case of group h, its pictures written to a folder."""
    p = case.params
    return Request(
        image=save(folder / "image.png", t["image_input"]),
        end_image=save(folder / "end.png", t["end_image_input"]) if p["end_frame"] else None,
        keyframes={
            number: save(folder / f"{number}.png", t[f"section_image_{number}"])
            for number in p["section_keys"]
        },
        prompt=p["prompt"],
        negative_prompt=p["n_prompt"],
        seed=p["seed"],
        seconds=p["total_second_length"],
        latent_window_size=p["latent_window_size"],
        steps=p["steps"],
        true_cfg_scale=p["cfg"],
        guidance_scale=p["gs"],
        guidance_rescale=p["rs"],
        cache="teacache" if p["use_teacache"] else "none",
        width=p["width"],
        height=p["height"],
    )


def conditioned(case: Case, t: Tensors, engine: Engine, request: Request) -> Conditioning:
    """Encode a request of group h; recorded pictures were drawn from the posterior with another generator."""
    return replace(
        engine.encode(request),
        start_latents=t["start_latent"],
        end_latents=t.get("end_frame_latent"),
        keyframe_latents={number: t[f"section_latent_{number}"] for number in case.params["section_keys"]},
    )


def history_of(clip: Clip, t: Tensors) -> torch.Tensor:
    """Put the reference's buffer together: the video, and what there was to look back on at first."""
    blank = torch.zeros_like(clip.start_latents).repeat(1, 1, HISTORY_FRAMES, 1, 1)
    if clip.kind == "f1":
        return torch.cat([blank, clip.latents], dim=2)
    blank[:, :, :1] = t.get("end_frame_latent", blank[:, :, :1])
    return torch.cat([clip.latents, blank], dim=2)
