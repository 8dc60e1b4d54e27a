"""Splits diffusers' FramePack transformer into what runs in each step and what runs once a video.

Within a section, only the latents change from step to step. What depends on the prompt and the step alone
(modulation, refined text, projected picture) is the same in every section: the :class:`Embedders`, which hold
29.5 % of the weights, compute it once into a :class:`Precomputed`. The sampling loop calls the :class:`Core`,
which does not need the embedders.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from torch import nn

from framepack_core.history import HistoryContext
from framepack_core.networks.encoders import TextConditioning
from framepack_core.sampling.step_cache import StepCache
from framepack_core.sections import Section

if TYPE_CHECKING:
    from diffusers import HunyuanVideoFramepackTransformer3DModel

Place = Callable[[nn.Module], AbstractContextManager[None]]
Rows = tuple[torch.Tensor, ...]  # a block's modulation, (1, C') each, as diffusers orders it
Rotary = tuple[torch.Tensor, torch.Tensor]  # cosines and sines, (tokens, head dim)


@dataclass(frozen=True)
class Precomputed:
    """What depends on the prompt and the steps but not on the latents; in the blocks' dtype."""

    modulation: Sequence[Sequence[Rows]]  # per step, per block; the last is the output's
    texts: Sequence[torch.Tensor]  # per step, (1, N, C): the refined prompt, without padding
    image: torch.Tensor  # (1, tokens, C): SigLIP's tokens of the picture, projected


@dataclass(frozen=True)
class HistoryTokens:
    """A section's history as tokens, and the rotary embedding of all its tokens; the same in all steps."""

    tokens: torch.Tensor  # (1, N, C): 4x, 2x and clean
    rotary: Rotary  # of these, then of the section's own tokens


class _PrecomputedRow(nn.Module):
    """Replaces a modulation's linear layer: picks its precomputed row."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self._index = index

    def forward(self, rows: Rows) -> torch.Tensor:
        return rows[self._index]


class Embedders(nn.Module):
    """The modules whose results are the same in every section; used once a video."""

    def __init__(self, transformer: "HunyuanVideoFramepackTransformer3DModel") -> None:
        """Move them out of a transformer, whose norms then take precomputed rows."""
        super().__init__()
        self.time_text_embed = transformer.time_text_embed
        self.context_embedder = transformer.context_embedder
        self.image_projection = transformer.image_projection
        norms = [
            *([block.norm1, block.norm1_context] for block in transformer.transformer_blocks),
            *([block.norm] for block in transformer.single_transformer_blocks),
            [transformer.norm_out],
        ]
        linears = [[norm.linear for norm in group] for group in norms]
        self.modulations = nn.ModuleList(nn.ModuleList(group) for group in linears)
        del transformer.time_text_embed, transformer.context_embedder, transformer.image_projection
        for group in norms:
            for index, norm in enumerate(group):
                norm.silu, norm.linear = nn.Identity(), _PrecomputedRow(index)
        transformer.norm_out.linear = nn.Identity()  # is called with its only row, not with a tuple

    def precompute(
        self,
        text: TextConditioning,
        image_embeds: torch.Tensor,
        timesteps: torch.Tensor,
        guidance: torch.Tensor,
        place: Place,
    ) -> Precomputed:
        """Compute all rows, with the calls that diffusers makes in each step, so that the bits are the same.

        Args:
            text: on the device, in the blocks' dtype.
            image_embeds: likewise, (1, tokens, C).
            timesteps: (steps,), from :func:`timesteps`.
            guidance: (1,), from :func:`guidance`.
            place: keeps a module on the device while it is used, one at a time.
        """
        own_rows = int(text.prompt_embeds_mask.sum())
        steps = timesteps.reshape(-1, 1)
        with place(self.time_text_embed):
            embedded = [self.time_text_embed(t, text.pooled_prompt_embeds, guidance)[0] for t in steps]
        with place(self.context_embedder):
            texts = [
                self.context_embedder(text.prompt_embeds, t, text.prompt_embeds_mask)[:, :own_rows].clone()
                for t in steps
            ]
        with place(self.image_projection):
            image = self.image_projection(image_embeds)
        activated = [nn.functional.silu(row) for row in embedded]
        blocks = []
        for group in self.modulations.children():
            rows = []
            for linear in group.children():
                with place(linear):
                    rows.append([linear(row) for row in activated])
            blocks.append(list(zip(*rows, strict=True)))  # per step: the rows of this block
        return Precomputed(list(zip(*blocks, strict=True)), texts, image)


class Blocks(nn.Module):
    """The transformer blocks, in their order: almost all weights of the sampling loop."""

    def __init__(self, transformer: "HunyuanVideoFramepackTransformer3DModel") -> None:
        """Share a transformer's blocks."""
        super().__init__()
        self.transformer_blocks = transformer.transformer_blocks
        self.single_transformer_blocks = transformer.single_transformer_blocks

    def forward(
        self, hidden_states: torch.Tensor, context: torch.Tensor, rows: Sequence[Rows], rotary: Rotary
    ) -> torch.Tensor:
        """Give the latent tokens (1, N, C) after the last block; ``context`` (1, M, C): image, then text."""
        blocks = (*self.transformer_blocks, *self.single_transformer_blocks)
        for block, row in zip(blocks, rows, strict=True):
            hidden_states, context = block(hidden_states, context, row, None, rotary)
        return hidden_states


class Core(nn.Module):
    """The part of the transformer that the sampling loop needs."""

    def __init__(self, transformer: "HunyuanVideoFramepackTransformer3DModel") -> None:
        """Share the modules that the :class:`Embedders` have left in a transformer."""
        super().__init__()
        self.x_embedder = transformer.x_embedder
        self.clean_x_embedder = transformer.clean_x_embedder
        self.rope = transformer.rope
        self.blocks = Blocks(transformer)
        self.norm_out = transformer.norm_out
        self.proj_out = transformer.proj_out
        self._pack: Any = transformer._pack_history_states
        self._patch: int = transformer.config.patch_size

    def history_tokens(self, section: Section, history: HistoryContext) -> HistoryTokens:
        """Embed a section's history for all steps; ``history`` is on the device, in the blocks' dtype."""
        clean, history_2x, history_4x = self.clean_x_embedder(*history)
        height, width = history.latents_clean.shape[-2:]
        indices = (
            section.indices_latents,
            section.indices_latents_clean,
            section.indices_latents_history_2x,
            section.indices_latents_history_4x,
        )
        device = clean.device
        rotary = [self.rope(torch.tensor(run, device=device), height, width, device) for run in indices]
        no_own_tokens = clean[:, :0]
        rows, columns = height // self._patch, width // self._patch
        return HistoryTokens(
            *self._pack(no_own_tokens, clean, history_2x, history_4x, *rotary, rows, columns)
        )

    def forward(
        self,
        latents: torch.Tensor,
        precomputed: Precomputed,
        step: int,
        history: HistoryTokens,
        cache: StepCache | None,
    ) -> torch.Tensor:
        """Give the velocity (1, 16, T, h, w) of latents of that shape, in the dtype of the last layer."""
        own = self.x_embedder(latents)
        rows = precomputed.modulation[step]
        context = torch.cat([precomputed.image, precomputed.texts[step]], dim=1)
        hidden_states = torch.cat([history.tokens, own], dim=1)

        def blocks(entering: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.blocks(entering, context, rows[:-1], history.rotary)
            return result

        def modulated() -> torch.Tensor:
            result: torch.Tensor = self.blocks.transformer_blocks[0].norm1(hidden_states, emb=rows[0])[0]
            return result

        leaving = blocks(hidden_states) if cache is None else cache(hidden_states, modulated, blocks)
        patches = self.proj_out(self.norm_out(leaving[:, -own.shape[1] :], rows[-1][0]))
        _, _, frames, height, width = latents.shape
        velocity: torch.Tensor = rearrange(
            patches,
            "b (t h w) (c p q) -> b c t (h p) (w q)",
            t=frames,
            h=height // self._patch,
            w=width // self._patch,
            p=self._patch,
            q=self._patch,
        )
        return velocity


def split_transformer(transformer: "HunyuanVideoFramepackTransformer3DModel") -> tuple[Core, Embedders]:
    """Split a transformer; its own forward cannot be called after that."""
    embedders = Embedders(transformer)
    return Core(transformer), embedders


def timesteps(sigmas: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Give the timesteps (steps,) of noise levels (steps + 1,), rounded as FramePack does."""
    return (sigmas[:-1] * 1000.0).to(dtype)


def guidance(scale: float, dtype: torch.dtype) -> torch.Tensor:
    """Give the distilled guidance scale (1,) in the transformer's unit, thousandths, rounded likewise."""
    return torch.tensor([scale * 1000.0]).to(dtype)
