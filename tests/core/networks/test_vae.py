"""Decoding with kept tiles: the bits of the VAE's own decoding, with fewer tiles decoded."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo
from hypothesis import given, settings
from hypothesis import strategies as st

from framepack_core.engine import Clip, Step
from framepack_core.history import History, Shared
from framepack_core.memory import devices
from framepack_core.networks import vae
from framepack_core.sections import Kind, Section, plan
from tests.core.requests import TinyEngine, everything, request_for

HEIGHT, WIDTH = 2, 3  # of the latents
SIDE, PLACES = 16, 6  # of the tiles in space, in pixels, and how many of them there are


class Counted:
    """A very small VAE that counts its decodings."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        small = {"block_out_channels": (4, 4, 4, 4), "layers_per_block": 1, "norm_num_groups": 2}
        self.vae = AutoencoderKLHunyuanVideo(**small).eval()
        self.calls = 0
        self.vae.decoder.register_forward_hook(self._count)

    def _count(self, *_: object) -> None:
        self.calls += 1

    def plainly(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode as diffusers does, uncounted."""
        calls = self.calls
        pixels: torch.Tensor = self.vae.decode(latents / self.vae.config.scaling_factor).sample
        self.calls = calls
        return pixels


@pytest.fixture(scope="module")
def counted() -> Counted:
    return Counted()


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def windows(kind: Kind, window: int, sections: int) -> Iterator[tuple[Section, torch.Tensor, Shared | None]]:
    """Give the latents decoded after each section of a video of noise, and what the next window shares."""
    generator = torch.Generator().manual_seed(window)

    def noise(count: int) -> torch.Tensor:
        return torch.randn((1, 16, count, HEIGHT, WIDTH), generator=generator)

    history = History(kind, window, noise(1))
    planned = plan(kind, sections, window)
    for section in planned:
        history.append(section, noise(window))
        following = None if section.is_last else planned[section.index + 1]
        shared = history.shared(section, following) if following else None
        yield section, history.decodable(section), shared


# Tiles that are decoded, section by section, of a video of four.
CALLS = {
    ("framepack", 9): [3, 4, 4, 6],
    ("f1", 9): [3, 6, 4, 4],
    ("framepack", 12): [4, 5, 5, 8],
    ("f1", 12): [4, 8, 5, 5],
    ("framepack", 4): [1, 3, 3, 3],
    ("f1", 4): [2, 3, 3, 3],
    ("framepack", 3): [1, 2, 2, 2],
    ("f1", 3): [1, 2, 2, 2],
    ("framepack", 1): [1] * 4,
    ("f1", 1): [1] * 4,
    ("framepack", 8): [3, 5, 5, 4],  # the picture's latent puts the last section's tiles in their place
}


@pytest.mark.parametrize("tile", [None, SIDE])
@pytest.mark.parametrize(("kind", "window"), CALLS)
def test_frames_are_the_same_to_the_bit_and_no_tile_is_decoded_twice(
    counted: Counted, kind: Kind, window: int, tile: int | None
) -> None:
    devices.set_tiles(counted.vae, tile)
    in_space = 1 if tile is None else PLACES
    tiles, calls = vae.Tiles(), []
    for _, latents, shared in windows(kind, window, 4):
        counted.calls = 0
        assert torch.equal(vae.decode(latents, counted.vae, tiles, shared), counted.plainly(latents))
        calls.append(counted.calls / in_space)
    assert calls == CALLS[kind, window]
    assert tiles.kept == [], "nothing is held on to after the last section"


def test_no_more_than_two_tiles_are_kept_at_the_usual_window(counted: Counted) -> None:
    devices.set_tiles(counted.vae, None)
    for kind in ("framepack", "f1"):
        tiles = vae.Tiles()
        for _, latents, shared in windows(kind, 9, 4):
            vae.decode(latents, counted.vae, tiles, shared)
            assert len(tiles.kept) <= 2


@given(st.integers(1, 10), st.integers(1, 4), st.sampled_from(["framepack", "f1"]), st.data())
@settings(max_examples=15, deadline=None)
def test_the_frames_do_not_depend_on_which_tiles_are_kept(
    window: int, sections: int, kind: Kind, choose: st.DataObject
) -> None:
    counted, tiles = Counted(), vae.Tiles()
    with torch.inference_mode():
        for _, latents, shared in windows(kind, window, sections):
            devices.set_tiles(counted.vae, choose.draw(st.sampled_from([None, None, SIDE, 24])))
            if choose.draw(st.booleans()):
                tiles.kept = tiles.kept[: choose.draw(st.integers(0, 3))]
            pixels = vae.decode(latents, counted.vae, tiles, shared)
            assert torch.equal(pixels, counted.plainly(latents))


def test_tiles_of_other_latents_or_settings_are_never_used(counted: Counted) -> None:
    devices.set_tiles(counted.vae, None)
    tiles = vae.Tiles()
    (_, first, shared), (_, second, _) = list(windows("framepack", 9, 3))[:2]
    vae.decode(first, counted.vae, tiles, shared)
    kept, counted.calls = list(tiles.kept), 0
    other = second.clone()
    other[:, :, 10] += 1e-3  # in one of the two
    vae.decode(other, counted.vae, tiles)
    assert counted.calls == 5
    devices.set_tiles(counted.vae, SIDE)
    tiles.kept, counted.calls = kept, 0
    assert torch.equal(vae.decode(second, counted.vae, tiles), counted.plainly(second))
    assert counted.calls == 6 * PLACES


def test_a_tile_that_would_give_no_frame_is_not_decoded(counted: Counted) -> None:
    devices.set_tiles(counted.vae, None)
    latents = torch.randn(1, 16, 10, HEIGHT, WIDTH)
    counted.calls = 0
    assert torch.equal(vae.decode(latents, counted.vae), counted.plainly(latents))
    assert counted.calls == 3


def test_a_failed_tile_leaves_the_vae_as_it_was(counted: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(counted.vae.decoder, "forward", fail)
    with pytest.raises(torch.OutOfMemoryError):
        vae.decode(torch.randn(1, 16, 9, HEIGHT, WIDTH), counted.vae)
    assert counted.vae.use_framewise_decoding


@pytest.mark.parametrize("transformer", ["framepack-i2v", "framepack-f1"])
def test_a_resumed_video_decodes_missing_tiles_again_with_the_same_bits(
    tiny_engine: TinyEngine, tmp_path: Path, transformer: str
) -> None:
    """With a window so large that tiles are kept, unlike in the other tests of resuming."""
    engine = tiny_engine(transformer)
    request = request_for(tmp_path, latent_window_size=6, seconds=3, steps=1, width=32)
    conditioned = engine.encode(request)
    whole: list[Step | Clip] = list(engine.sample(request, conditioned))
    for number in (3, 4, 5):
        rest = list(engine.sample(request, conditioned, resume=whole[number].progress))
        assert everything(rest) == everything(whole[number + 1 :]), f"after event {number}"
    undecoded = replace(whole[4].progress, decoded=0, edge=None)
    again = list(engine.sample(request, conditioned, resume=undecoded))
    assert everything(again[-1:]) == everything(whole[-1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_edge_fades_with_the_weights_of_the_pixels_dtype(dtype: torch.dtype) -> None:
    """Computed on the CPU wherever the pixels are: devices differ in the last bit of a linspace."""
    earlier, later = torch.rand(2, 1, 3, 9, 2, 2).to(dtype)
    weights = torch.linspace(1, 0, 5, dtype=dtype)
    joined = vae.blend(earlier, later, 5)
    for frame, weight in enumerate(weights):
        faded = weight * earlier[:, :, 4 + frame] + (1 - weight) * later[:, :, frame]
        assert torch.equal(joined[:, :, 4 + frame], faded)
    assert joined.dtype == dtype
