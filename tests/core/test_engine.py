"""The engine as its caller sees it: the events, leaving the loop, and refusals."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from framepack_core.engine import Clip, Engine, Step
from framepack_core.errors import RequestError
from framepack_core.media.sizes import output_size
from framepack_core.models.registry import BUILT_IN
from framepack_core.request import Request
from framepack_core.sections import frame_count, section_count
from tests.conftest import whole_video

TinyEngine = Callable[[str], Engine]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 255, (40, 56, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    return tmp_path / "image.png"


def small(image: Path, **settings: object) -> Request:
    defaults = {"seconds": 1, "latent_window_size": 3, "steps": 4, "width": 48, "height": 32}
    return Request.model_validate({"image": image, "prompt": "a cat", **defaults, **settings})


def test_generate_yields_every_step_and_a_clip_after_every_section(
    tiny_engine: TinyEngine, image: Path
) -> None:
    events = list(tiny_engine("framepack-i2v").generate(small(image)))
    told = [(e.section, e.step) if isinstance(e, Step) else e.section for e in events]
    assert told == [(0, 1), (0, 2), (0, 3), (0, 4), 0, (1, 1), (1, 2), (1, 3), (1, 4), 1]
    assert all(e.denoised.shape == (1, 16, 3, 4, 6) for e in events if isinstance(e, Step))
    video = whole_video(tiny_engine("framepack-i2v"), events)
    assert video.shape == (25, 32, 48, 3)
    assert video.dtype == np.uint8


@pytest.mark.parametrize("cache", ["none", "teacache"])
@pytest.mark.parametrize(
    ("window", "steps", "seconds"), [(1, 1, 1), (1, 2, 1), (2, 3, 1), (5, 1, 2), (33, 1, 1)]
)
@pytest.mark.parametrize("transformer", ["framepack-i2v", "framepack-f1"])
def test_the_length_is_right_at_every_edge_of_the_settings(
    tiny_engine: TinyEngine, image: Path, transformer: str, window: int, steps: int, seconds: int, cache: str
) -> None:
    settings = {"latent_window_size": window, "steps": steps, "seconds": seconds, "cache": cache, "width": 32}
    events = list(tiny_engine(transformer).generate(small(image, **settings)))
    sections = section_count(seconds, window)
    assert events[-1].section == sections - 1
    assert len(whole_video(tiny_engine(transformer), events)) == frame_count(sections, window)


def test_the_same_request_gives_the_same_bits_and_another_seed_others(
    tiny_engine: TinyEngine, image: Path
) -> None:
    def latents(**settings: object) -> torch.Tensor:
        *_, last = tiny_engine("framepack-f1").generate(small(image, **settings))
        return last.latents

    assert torch.equal(latents(), latents())
    assert not torch.equal(latents(), latents(seed=1))


def test_each_picture_is_drawn_with_a_generator_of_its_own(tiny_engine: TinyEngine, image: Path) -> None:
    engine = tiny_engine("framepack-i2v")
    conditioned = engine.encode(small(image, end_image=image, keyframes={0: image}))
    assert torch.equal(conditioned.start_latents, conditioned.end_latents)
    assert torch.equal(conditioned.start_latents, conditioned.keyframe_latents[0])
    torch.manual_seed(1)  # what others draw from has no say
    assert torch.equal(engine.encode(small(image)).start_latents, conditioned.start_latents)


def test_an_end_frame_of_another_shape_takes_the_size_of_the_picture(
    tiny_engine: TinyEngine, image: Path, tmp_path: Path
) -> None:
    tall = tmp_path / "tall.png"
    Image.new("RGB", (30, 90), "red").save(tall)
    conditioned = tiny_engine("framepack-i2v").encode(small(image, end_image=tall))
    assert conditioned.end_latents is not None
    assert conditioned.end_latents.shape == conditioned.start_latents.shape


def test_each_guidance_branch_has_a_cache_of_its_own(tiny_engine: TinyEngine, image: Path) -> None:
    """With equal prompts both branches are equal, so guidance must change nothing, cached or not."""
    engine = tiny_engine("framepack-i2v")

    def generate(**settings: object) -> tuple[list[bool], torch.Tensor]:
        events = list(engine.generate(small(image, steps=12, cache="teacache", **settings)))
        assert isinstance(events[-1], Clip)
        return [event.computed for event in events if isinstance(event, Step)], events[-1].latents

    plain, guided = generate(), generate(true_cfg_scale=3.0, negative_prompt="a cat")
    assert plain[0] == guided[0]
    assert not all(plain[0])
    assert (plain[1] - guided[1]).abs().max() < 1e-4


def test_a_forward_model_refuses_an_end_frame(tiny_engine: TinyEngine, image: Path) -> None:
    with pytest.raises(RequestError, match="framepack-f1 generates forward"):
        next(tiny_engine("framepack-f1").generate(small(image, end_image=image)))


def test_stills_show_the_section_they_name_and_are_in_the_video(tiny_engine: TinyEngine, image: Path) -> None:
    clips = [
        e for e in tiny_engine("framepack-i2v").generate(small(image, seconds=1.6)) if isinstance(e, Clip)
    ]
    video = whole_video(tiny_engine("framepack-i2v"), clips)
    for clip in clips:
        # Sections are made from the end; each is 12 frames, its last one counted from the picture.
        last_of_section = 12 * (len(clips) - clip.section)
        assert np.array_equal(clip.still, video[last_of_section]), clip.section


def test_the_demo_model_is_made_of_the_real_classes(image: Path) -> None:
    engine = Engine.load(BUILT_IN["demo"], device="cpu")
    names = {type(part).__name__ for part in vars(engine.models).values()}
    assert {
        "HunyuanVideoFramepackTransformer3DModel",
        "AutoencoderKLHunyuanVideo",
        "LlamaModel",
        "CLIPTextModel",
        "SiglipVisionModel",
        "SiglipImageProcessorPil",
    } <= names
    request = Request(image=image, prompt="pan left", seconds=1, steps=1)
    assert output_size(request, (40, 56), engine.models.spec.buckets) == (160, 240)
    small = request.model_copy(update={"width": 48, "height": 32})  # to decode takes longest
    assert whole_video(engine, engine.generate(small)).shape == (37, 32, 48, 3)
