"""Counts the tiles that sharing between neighbouring sections saves; the pixels are the same.

A VAE with random weights and few channels, untiled in space; 20 s of video, cut in time as the real one.

python -m benchmarks.tiles
"""

from collections.abc import Iterator

import torch
from diffusers import AutoencoderKLHunyuanVideo

from benchmarks import Row
from framepack_core.history import History
from framepack_core.networks import vae
from framepack_core.sections import Kind, plan, section_count

WINDOW, HEIGHT, WIDTH = 9, 4, 4


@torch.inference_mode()
def decodes(kind: Kind) -> tuple[list[int], list[int]]:
    """Count the tiles of each section, ours and as the VAE decodes by itself; the pixels must be equal."""
    torch.manual_seed(0)
    small = AutoencoderKLHunyuanVideo(block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2)
    calls = [0]

    def count(*_: object) -> None:
        calls[0] += 1

    small.eval().decoder.register_forward_hook(count)
    history, tiles = History(kind, WINDOW, torch.randn(1, 16, 1, HEIGHT, WIDTH)), vae.Tiles()
    sections = plan(kind, section_count(20, WINDOW), WINDOW)
    ours, alone = [], []
    for section in sections:
        history.append(section, torch.randn(1, 16, WINDOW, HEIGHT, WIDTH))
        latents = history.decodable(section)
        shared = None if section.is_last else history.shared(section, sections[section.index + 1])
        calls[0] = 0
        pixels = vae.decode(latents, small, tiles, shared)
        ours.append(calls[0])
        plain = small.decode(latents / small.config.scaling_factor).sample
        alone.append(calls[0] - ours[-1])
        assert torch.equal(pixels, plain)
    return ours, alone


def rows() -> Iterator[Row]:
    """Count in both directions."""
    for kind in ("framepack", "f1"):
        ours, alone = decodes(kind)
        steady = len(ours) // 2
        proves = "no tile is decoded twice in a row; pixels equal to the bit"
        yield Row(f"tiles decoded in a steady section, {kind}", ours[steady], alone[steady], "", proves)
        yield Row(f"tiles decoded for 20 s, {kind}", sum(ours), sum(alone), "", proves)


if __name__ == "__main__":
    for row in rows():
        print(f"{row.name:48} {row.ours:6.0f} of {row.baseline:.0f}")
