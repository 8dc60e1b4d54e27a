"""Between pictures and latents: encoding, decoding and blending what was decoded section by section.

Owns the scaling factor: latents outside this module are scaled, as the transformer takes them.
"""

from typing import TYPE_CHECKING

import torch
from einops import rearrange

from framepack_core.media import Frames, Picture
from framepack_core.sections import Kind

if TYPE_CHECKING:
    from diffusers import AutoencoderKLHunyuanVideo


def encode(picture: Picture, vae: "AutoencoderKLHunyuanVideo", generator: torch.Generator) -> torch.Tensor:
    """Encode a picture (H, W, 3) to latents (1, 16, 1, H/8, W/8), float32 on the CPU.

    The posterior is drawn from ``generator``, which lives on the CPU so that every device draws alike.
    """
    pixels = rearrange(torch.from_numpy(picture.copy()), "h w c -> 1 c 1 h w").float() / 127.5 - 1
    posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
    latents: torch.Tensor = posterior.sample(generator=generator) * vae.config.scaling_factor
    return latents.float().cpu()


def decode(latents: torch.Tensor, vae: "AutoencoderKLHunyuanVideo") -> torch.Tensor:
    """Decode latents (1, 16, T, h, w) to pixels (1, 3, 4T-3, 8h, 8w) around [-1, 1], on the CPU.

    The VAE cuts more than 4 latent frames into overlapping tiles in time; pixels depend on it.
    """
    unscaled = latents / vae.config.scaling_factor
    pixels: torch.Tensor = vae.decode(unscaled.to(vae.device, vae.dtype)).sample
    return pixels.cpu()


def blend(earlier: torch.Tensor, later: torch.Tensor, overlap: int) -> torch.Tensor:
    """Join two runs of pixels (1, 3, T, H, W), fading linearly over ``overlap`` frames.

    The first frame of the overlap is all ``earlier``, the last all ``later``; in the dtype of ``earlier``.
    """
    if overlap <= 0:
        return torch.cat([earlier, later], dim=2)
    weights = torch.linspace(1, 0, overlap, dtype=earlier.dtype).reshape(1, 1, -1, 1, 1)
    faded = weights * earlier[:, :, -overlap:] + (1 - weights) * later[:, :, :overlap]
    return torch.cat([earlier[:, :, :-overlap], faded, later[:, :, overlap:]], dim=2)


def join(
    kind: Kind, edge: torch.Tensor | None, decoded: torch.Tensor, overlap: int, *, is_last: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Join a decoded section to the video's edge: the ``overlap`` frames next to it, of the one before.

    Gives the pixels that no later section changes, and the new edge; after the last section there is none.
    """
    forward = kind == "f1"
    if edge is None:
        joined = decoded
    else:
        joined = blend(edge, decoded, overlap) if forward else blend(decoded, edge, overlap)
    if is_last:
        return joined, None
    if forward:
        return joined[:, :, :-overlap], joined[:, :, -overlap:].clone()
    return joined[:, :, overlap:], joined[:, :, :overlap].clone()


def to_uint8(pixels: torch.Tensor) -> Frames:
    """Convert pixels (1, 3, T, H, W) to frames (T, H, W, 3); truncated, not rounded, as the reference."""
    _, channels, count, height, width = pixels.shape
    frames = torch.empty((count, height, width, channels), dtype=torch.uint8)
    for frame, picture in zip(
        frames, pixels[0].unbind(dim=1), strict=True
    ):  # one by one: a long video is large
        scaled = picture.float().clamp(-1, 1) * 127.5 + 127.5
        frame.copy_(rearrange(scaled.to(torch.uint8), "c h w -> h w c"))
    array: Frames = frames.numpy()
    return array
