"""Random inputs of a transformer."""

from contextlib import nullcontext
from typing import Any

import torch

from framepack_core.history import HistoryContext
from framepack_core.networks.encoders import TextConditioning, pad_prompt_embeds
from framepack_core.networks.transformer import Precomputed, guidance, timesteps

WINDOW, HEIGHT, WIDTH = 3, 8, 12

SIGMAS = torch.tensor([1.0, 0.8125, 0.3, 0.0])
Given = tuple[torch.Tensor, TextConditioning, torch.Tensor, HistoryContext]


def inputs(config: Any, dtype: torch.dtype) -> Given:
    """Draw latents, text, image embeds and history."""
    generator = torch.Generator().manual_seed(7)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    text = pad_prompt_embeds(random(1, 5, config.text_embed_dim), random(1, config.pooled_projection_dim))
    latents = random(1, 16, WINDOW, HEIGHT, WIDTH)
    history = HistoryContext(*(random(1, 16, frames, HEIGHT, WIDTH) for frames in (2, 2, 16)))
    return latents, text, random(1, 4, config.image_proj_dim), history


def precompute(embedders: Any, given: Given, scale: float, dtype: torch.dtype) -> Precomputed:
    _, text, image_embeds, _ = given
    steps = timesteps(SIGMAS, dtype)
    precomputed: Precomputed = embedders.precompute(
        text, image_embeds, steps, guidance(scale, dtype), lambda _: nullcontext()
    )
    return precomputed
