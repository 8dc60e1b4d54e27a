"""Decodes latents to small preview pictures with TAEHV: sharper than a linear map, but not the VAE.

Each latent frame becomes one picture: the last of its four frames, no larger than asked for. The last stages
of the network do not enlarge then, which saves most of the work. It runs on the CPU, frame by frame, so that
memory does not grow with the number of frames.
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

CLAMP = 3.0  # latents are squeezed into -3 to 3
STAGES = len(WIDTHS) - 1  # each can double height and width


@dataclass(frozen=True)
class TinyDecoder:
    """The network: its weights, float32 on the CPU, by their names in the file without "decoder."."""

    weights: Mapping[str, torch.Tensor]

    @classmethod
    def load(cls, file: Path) -> Self:
        """Read the weights from a .safetensors or .pth file; of a .pth file only tensors are unpickled.

        Raises:
            ModelError: the file is not there, or holds something else.
        """
        taehv_files.check_file(file)
        try:
            if file.suffix.lower() == ".safetensors":
                tensors = safetensors.torch.load_file(file)
            else:
                tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        except Exception as error:  # torch raises many types
            reason = str(error).partition("\n")[0]
            raise ModelError(f"{file} holds no weights ({reason}): download it again") from error
        taehv_files.check_shapes(file, found)
        # Copies: the process would crash if the mapped file were truncated.
        names = taehv_files.shapes()
        return cls({name: tensors[PREFIX + name].to(torch.float32, copy=True) for name in names})

    @torch.inference_mode()
    def frames(self, latents: torch.Tensor, side: int, between: Callable[[], None] = lambda: None) -> Picture:
        """Decode latents (1, 16, T, h, w) to frames (T, H, W, 3), uint8.

        H and W are h and w times 1, 2, 4 or 8, so that the longer side is near ``side`` pixels. ``between``
        is called before each block, and may raise to stop.
        """
        doublings = round(math.log2(max(side / max(latents.shape[-2:]), 1)))
        numbers = latents[0].float().nan_to_num(posinf=0, neginf=0)
        before: dict[int, torch.Tensor] = {}  # by block: its input at the frame before
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
            # Growth in time makes several frames of one: only the rows of the last are computed.
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
