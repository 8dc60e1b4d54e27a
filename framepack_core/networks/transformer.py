"""Takes diffusers' FramePack transformer apart: what each step computes, and what a video needs once.

Of a step's inputs only the latents change within a section. What depends on the prompt and the step, but not
on the latents (modulation, refined text, projected picture), is the same in every section of a video: it is
computed once into :class:`Tables` by the :class:`Embedders`, which hold 29.5 % of the weights. The
:class:`Core` that the sampling loop calls does without these.
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
class Tables:
    """What a prompt and a schedule of steps give, whatever the latents; in the blocks' dtype."""

    modulation: Sequence[Sequence[Rows]]  # per step, per block; the last is the output's
    texts: Sequence[torch.Tensor]  # per step, (1, N, C): the prompt's own rows, refined
    image: torch.Tensor  # (1, tokens, C): the picture as SigLIP saw it, projected


@dataclass(frozen=True)
class LookBack:
    """What a section looks back on, and where all its tokens are; the same for all of its steps."""

    tokens: torch.Tensor  # (1, N, C): 4x, 2x and clean
    rotary: Rotary  # of these and the section's own


class _Given(nn.Module):
    """Stands where a modulation was computed: its row is among those that come in its place."""

    def __init__(self, place: int) -> None:
        super().__init__()
        self._place = place

    def forward(self, rows: Rows) -> torch.Tensor:
        return rows[self._place]


class Embedders(nn.Module):
    """The modules whose results are the same in every section: used once a video."""

    def __init__(self, transformer: "HunyuanVideoFramepackTransformer3DModel") -> None:
        """Take them out of a transformer; the modulations' rows are given to it from then on."""
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
            for place, norm in enumerate(group):
                norm.silu, norm.linear = nn.Identity(), _Given(place)
        transformer.norm_out.linear = nn.Identity()  # wants a tensor, and has but one row

    def tables(
        self,
        text: TextConditioning,
        image_embeds: torch.Tensor,
        timesteps: torch.Tensor,
        guidance: torch.Tensor,
        place: Place,
    ) -> Tables:
        """Compute all rows, with the very calls that diffusers makes in each step: the bits are the same.

        Args:
            text: on the device, in the blocks' dtype.
            image_embeds: likewise, (1, tokens, C).
            timesteps: (steps,), as :func:`timesteps` gives them.
            guidance: (1,), as :func:`guidance` gives it.
            place: has a module on the device while it is used; no two at a time.
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
            blocks.append(list(zip(*rows, strict=True)))  # per step, the block's rows
        return Tables(list(zip(*blocks, strict=True)), texts, image)


class Blocks(nn.Module):
    """The transformer blocks, one after the other: all that is large in the sampling loop."""

    def __init__(self, transformer: "HunyuanVideoFramepackTransformer3DModel") -> None:
        """Share a transformer's blocks."""
        super().__init__()
        self.transformer_blocks = transformer.transformer_blocks
        self.single_transformer_blocks = transformer.single_transformer_blocks

    def forward(
        self, hidden_states: torch.Tensor, context: torch.Tensor, rows: Sequence[Rows], rotary: Rotary
    ) -> torch.Tensor:
        """Give the latent tokens (1, N, C) after the last block; ``context`` (1, M, C), image before text."""
        blocks = (*self.transformer_blocks, *self.single_transformer_blocks)
        for block, row in zip(blocks, rows, strict=True):
            hidden_states, context = block(hidden_states, context, row, None, rotary)
        return hidden_states


class Core(nn.Module):
    """What the sampling loop needs of the transformer."""

    def __init__(self, transformer: "HunyuanVideoFramepackTransformer3DModel") -> None:
        """Share a transformer's modules, those that its :class:`Embedders` have left."""
        super().__init__()
        self.x_embedder = transformer.x_embedder
        self.clean_x_embedder = transformer.clean_x_embedder
        self.rope = transformer.rope
        self.blocks = Blocks(transformer)
        self.norm_out = transformer.norm_out
        self.proj_out = transformer.proj_out
        self._pack: Any = transformer._pack_history_states
        self._patch: int = transformer.config.patch_size

    def look_back(self, section: Section, history: HistoryContext) -> LookBack:
        """Compute what all steps of a section share; ``history`` on the device, in the blocks' dtype."""
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
        nothing_yet = clean[:, :0]
        rows, columns = height // self._patch, width // self._patch
        return LookBack(*self._pack(nothing_yet, clean, history_2x, history_4x, *rotary, rows, columns))

    def forward(
        self, latents: torch.Tensor, tables: Tables, step: int, look_back: LookBack, cache: StepCache | None
    ) -> torch.Tensor:
        """Give the velocity (1, 16, T, h, w) of latents of that shape, in the dtype of the last layer."""
        own = self.x_embedder(latents)
        rows = tables.modulation[step]
        context = torch.cat([tables.image, tables.texts[step]], dim=1)
        hidden_states = torch.cat([look_back.tokens, own], dim=1)

        def blocks(entering: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.blocks(entering, context, rows[:-1], look_back.rotary)
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


def take_apart(transformer: "HunyuanVideoFramepackTransformer3DModel") -> tuple[Core, Embedders]:
    """Take a transformer apart; its own forward cannot be called any more."""
    embedders = Embedders(transformer)
    return Core(transformer), embedders


def timesteps(sigmas: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Give the timesteps (steps,) of noise levels (steps + 1,), rounded as FramePack does."""
    return (sigmas[:-1] * 1000.0).to(dtype)


def guidance(scale: float, dtype: torch.dtype) -> torch.Tensor:
    """Give the distilled guidance scale (1,) as the transformer was trained with, rounded likewise."""
    return torch.tensor([scale * 1000.0]).to(dtype)
