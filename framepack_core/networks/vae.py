"""Encodes frames to latents, decodes latents section by section, and blends the sections.

Owns the scaling factor: latents outside this module are scaled, as the transformer takes them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from einops import rearrange

from framepack_core.history import Shared
from framepack_core.media.pictures import Frames
from framepack_core.sections import Kind

if TYPE_CHECKING:
    from diffusers import AutoencoderKLHunyuanVideo


def encode(frames: Frames, vae: "AutoencoderKLHunyuanVideo") -> torch.Tensor:
    """Encode frames (4T-3, H, W, 3) to a posterior (1, 32, T, H/8, W/8), means and variances, on the CPU."""
    posterior: torch.Tensor = vae.encode(to_pixels(frames).to(vae.device, vae.dtype)).latent_dist.parameters
    return posterior.cpu()


def to_pixels(frames: Frames) -> torch.Tensor:
    """Convert frames (T, H, W, 3) to pixels (1, 3, T, H, W) in [-1, 1], float32 on the CPU."""
    return rearrange(torch.from_numpy(frames.copy()), "t h w c -> 1 c t h w").float() / 127.5 - 1


def draw(
    posterior: torch.Tensor, scaling_factor: float, generator: torch.Generator, device: torch.device
) -> torch.Tensor:
    """Draw latents (1, 16, T, h, w), float32 on the CPU, from a posterior of :func:`encode`.

    Computed on the device; ``generator`` is on the CPU, so that the noise is the same for every device.
    """
    drawn = DiagonalGaussianDistribution(posterior.to(device)).sample(generator=generator)
    latents: torch.Tensor = drawn * scaling_factor
    return latents.float().cpu()


class _Tile(NamedTuple):
    settings: tuple[object, ...]  # of the VAE, on which the pixels depend
    latents: torch.Tensor  # (1, 16, 5, h, w)
    pixels: torch.Tensor  # (1, 3, 17, 8h, 8w), on the CPU: a section is sampled before they are needed


@dataclass
class Tiles:
    """Decoded tiles that the next decoding window repeats."""

    kept: list[_Tile] = field(default_factory=list)

    def find(self, settings: tuple[object, ...], latents: torch.Tensor) -> torch.Tensor | None:
        """Give the pixels of the tile with exactly these latents and settings; None if there is none."""
        for tile in self.kept:
            if tile.settings == settings and torch.equal(tile.latents, latents):
                return tile.pixels
        return None


def decode(
    latents: torch.Tensor,
    vae: "AutoencoderKLHunyuanVideo",
    tiles: Tiles | None = None,
    shared: Shared | None = None,
) -> torch.Tensor:
    """Decode latents (1, 16, T, h, w) to pixels (1, 3, 4T-3, 8h, 8w) around [-1, 1], on the VAE's device.

    The VAE cuts more than 4 latent frames into overlapping tiles in time; the pixels depend on the cut. Pass
    the same ``tiles`` to the calls of a video: tiles of the last window are reused, and those that the next
    window repeats, which ``shared`` tells, are kept. The pixels have the same bits as without.
    """
    tiles = Tiles() if tiles is None else tiles
    ratio = vae.temporal_compression_ratio
    size, stride = vae.tile_sample_min_num_frames // ratio, vae.tile_sample_stride_num_frames // ratio
    count = latents.shape[2]
    if not vae.use_framewise_decoding or count <= size:
        tiles.kept = []
        return _decode(latents, vae)
    settings, kept = _settings(vae), []
    frames, before = latents.new_empty(0), None
    with _tiles_in_space_only(vae):
        # A last tile of a single latent adds nothing: the first frame of a tile comes from the tile before.
        for start in range(0, count - 1, stride):
            tile = latents[:, :, start : start + size + 1]
            found = tiles.find(settings, tile)
            pixels = _decode(tile, vae) if found is None else found.to(vae.device)
            if tile.shape[2] > size and shared is not None and shared.cut_alike(start, size + 1, stride):
                kept.append(_Tile(settings, tile.clone(), pixels.cpu()))
            if before is None:
                frames = pixels.new_empty((*pixels.shape[:2], ratio * (count - 1) + 1, *pixels.shape[3:]))
                frames[:, :, : ratio * stride + 1] = pixels[:, :, : ratio * stride + 1]
            else:
                place = frames[:, :, ratio * start + 1 : ratio * (start + stride) + 1]
                place.copy_(pixels[:, :, 1 : place.shape[2] + 1])
                vae.blend_t(before, place, ratio * (size - stride))  # in place
            before = pixels
    tiles.kept = kept
    return frames


def _decode(latents: torch.Tensor, vae: "AutoencoderKLHunyuanVideo") -> torch.Tensor:
    unscaled = latents / vae.config.scaling_factor
    pixels: torch.Tensor = vae.decode(unscaled.to(vae.device, vae.dtype)).sample
    return pixels


def _settings(vae: "AutoencoderKLHunyuanVideo") -> tuple[object, ...]:
    sides = (vae.tile_sample_min_height, vae.tile_sample_min_width)
    strides = (vae.tile_sample_stride_height, vae.tile_sample_stride_width)
    return (vae.device, vae.dtype, vae.use_tiling, *sides, *strides)


@contextmanager
def _tiles_in_space_only(vae: "AutoencoderKLHunyuanVideo") -> Iterator[None]:
    """Switch the VAE's tiles in time off inside the block; tiles in space stay."""
    vae.use_framewise_decoding = False
    try:
        yield
    finally:
        vae.use_framewise_decoding = True


def blend(earlier: torch.Tensor, later: torch.Tensor, overlap: int) -> torch.Tensor:
    """Join two runs of pixels (1, 3, T, H, W), fading linearly over ``overlap`` frames.

    The first frame of the overlap is all ``earlier``, the last all ``later``; in the dtype of ``earlier``.
    """
    if overlap <= 0:
        return torch.cat([earlier, later], dim=2)
    weights = torch.linspace(1, 0, overlap, dtype=earlier.dtype)  # on the CPU: the same for every device
    weights = weights.reshape(1, 1, -1, 1, 1).to(earlier.device)
    joined = torch.cat([earlier, later[:, :, overlap:]], dim=2)
    fading = joined[:, :, earlier.shape[2] - overlap : earlier.shape[2]]  # in place: 77 MB a copy at 640x608
    fading.mul_(weights).add_((1 - weights) * later[:, :, :overlap])
    return joined


def join(
    kind: Kind, edge: torch.Tensor | None, decoded: torch.Tensor, overlap: int, *, is_last: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Blend a decoded section with the video's edge: the last ``overlap`` frames of the section before.

    Gives the pixels that no later section changes, and the new edge; None after the last section. In ``f1``
    the edge may be longer or, if a short video is extended, shorter.
    """
    forward = kind == "f1"
    if edge is None:
        joined = decoded
    else:
        edge = edge.to(decoded.device)  # the edge of an extended video comes from a file
        own = overlap + 3  # frames of the section, behind those that it shares with the edge
        joined = blend(edge, decoded, decoded.shape[2] - own) if forward else blend(decoded, edge, overlap)
    if is_last:
        return joined, None
    if forward:
        return joined[:, :, :-overlap], joined[:, :, -overlap:].clone()
    return joined[:, :, overlap:], joined[:, :, :overlap].clone()


def end_of(latents: torch.Tensor, window: int, vae: "AutoencoderKLHunyuanVideo") -> torch.Tensor:
    """Decode the end of a video, blended with the section before as when it was generated.

    Gives the pixels of at most ``2 * window`` latents.
    """
    last = decode(latents[:, :, -2 * window :], vae)
    if latents.shape[2] <= 2 * window:
        return last
    earlier = decode(latents[:, :, :-window][:, :, -2 * window :], vae)
    return blend(earlier, last, 4 * window - 3)[:, :, -last.shape[2] :]


def to_uint8(pixels: torch.Tensor) -> Frames:
    """Convert pixels (1, 3, T, H, W) to frames (T, H, W, 3) on the host; truncated, as in the reference.

    Converted on the pixels' device, so that only bytes are copied.
    """
    _, channels, count, height, width = pixels.shape
    frames = torch.empty((count, height, width, channels), dtype=torch.uint8, device=pixels.device)
    # One by one: float32 copies of a long video would be large.
    for frame, picture in zip(frames, pixels[0].unbind(dim=1), strict=True):
        scaled = picture.float().clamp(-1, 1) * 127.5 + 127.5
        frame.copy_(rearrange(scaled.to(torch.uint8), "c h w -> h w c"))
    if pixels.device.type == "cuda":  # into page-locked memory, to which the GPU copies directly
        frames = torch.empty_like(frames, device="cpu", pin_memory=True).copy_(frames)
    array: Frames = frames.numpy()
    return array
