"""Decodes latents to small pictures with TAEHV: sharper than a linear map, far from the VAE.

A frame of latents becomes one picture, the last of the four it stands for, no larger than asked for: the
stages of the network that come last do not enlarge, which saves most of the work. On the CPU, frame after
frame, so that memory does not grow with their number.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import safetensors.torch
import torch
from einops import rearrange
from torch.nn import functional

from framepack_core.errors import ModelError
from framepack_core.media.pictures import Picture
from framepack_core.models import taehv_files
from framepack_core.models.taehv_files import BLOCKS, FIRST_LAYER, LAST_LAYER, PREFIX, WIDTHS

CLAMP = 3.0  # latents are squeezed into +-this
STAGES = len(WIDTHS) - 1  # each can double height and width


@dataclass(frozen=True)
class TinyDecoder:
    """The network; its weights by their names in the file behind "decoder.", float32 on the CPU."""

    weights: Mapping[str, torch.Tensor]

    @classmethod
    def load(cls, file: Path) -> Self:
        """Read the weights from a .safetensors or .pth file; of the latter nothing but tensors.

        Raises:
            ModelError: it is not there, or no such file.
        """
        taehv_files.check_file(file)
        try:
            if file.suffix.lower() == ".safetensors":
                tensors = safetensors.torch.load_file(file)
            else:
                tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        except Exception as error:  # torch's are of many kinds
            reason = str(error).partition("\n")[0]
            raise ModelError(f"{file} holds no weights ({reason}): download it again") from error
        taehv_files.check_shapes(file, found)
        # Copies: what is read as it is needed would be gone with the file, and the process too.
        names = taehv_files.shapes()
        return cls({name: tensors[PREFIX + name].to(torch.float32, copy=True) for name in names})

    @torch.inference_mode()
    def frames(self, latents: torch.Tensor, side: int, between: Callable[[], None] = lambda: None) -> Picture:
        """Decode latents (1, 16, T, h, w) to frames (T, H, W, 3), uint8.

        H and W are h and w times 1, 2, 4 or 8, such that the longer comes near to ``side``. ``between`` is
        called every now and then, and may raise to end this.
        """
        doublings = round(math.log2(max(side / max(latents.shape[-2:]), 1)))
        numbers = latents[0].float().nan_to_num(posinf=0, neginf=0)
        before: dict[int, torch.Tensor] = {}  # what went into a block at the frame before
        frames = [
            self._frame(frame, min(doublings, STAGES), before, between)
            for frame in rearrange(numbers, "c t h w -> t 1 c h w")
        ]
        return np.stack(frames)

    def _frame(
        self,
        latents: torch.Tensor,
        doublings: int,
        before: dict[int, torch.Tensor],
        between: Callable[[], None],
    ) -> Picture:
        hidden = self._convolve(f"{FIRST_LAYER}", CLAMP * torch.tanh(latents / CLAMP)).relu_()
        for stage in range(STAGES):
            layer = taehv_files.stage_layer(stage)
            for block in range(layer, layer + BLOCKS):
                between()
                past = before.get(block, torch.zeros_like(hidden))
                before[block] = hidden
                hidden = self._block(block, hidden, past)
            # Of the frames that it would become, the last one's rows.
            growth = self.weights[f"{layer + BLOCKS + 1}.conv.weight"][-WIDTHS[stage] :]
            hidden = functional.conv2d(hidden, growth)
            if stage < doublings:
                hidden = functional.interpolate(hidden, scale_factor=2)
            hidden = self._convolve(f"{layer + BLOCKS + 2}", hidden)
        pixels = self._convolve(f"{LAST_LAYER}", hidden.relu_())[0].clamp_(0, 1)
        picture: Picture = rearrange((255 * pixels).round_().byte(), "c h w -> h w c").numpy()
        return picture

    def _block(self, number: int, hidden: torch.Tensor, past: torch.Tensor) -> torch.Tensor:
        change = self._convolve(f"{number}.conv.0", torch.cat([hidden, past], dim=1)).relu_()
        change = self._convolve(f"{number}.conv.2", change).relu_()
        return self._convolve(f"{number}.conv.4", change).add_(hidden).relu_()

    def _convolve(self, name: str, hidden: torch.Tensor) -> torch.Tensor:
        weight, bias = self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias")
        return functional.conv2d(hidden, weight, bias, padding=1)
