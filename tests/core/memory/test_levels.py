"""Memory levels: each takes less memory than the one before."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from framepack_core.engine import Clip, Engine, Step
from framepack_core.request import Request
from tests.conftest import tiny_spec
from tests.core.memory.limited import LimitedMemory


@pytest.fixture
def request_(tmp_path: Path) -> Request:
    pixels = np.random.default_rng(0).integers(0, 255, (40, 56, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    small = {"seconds": 1, "latent_window_size": 1, "steps": 1, "width": 320, "height": 320}
    return Request.model_validate({"image": tmp_path / "image.png", "prompt": "a cat", **small})


def first_section(engine: Engine, request: Request) -> tuple[torch.Tensor, int]:
    """Generate a section; give its last step's latents and the peak of memory."""
    conditioned = engine.encode(request)
    with LimitedMemory() as memory:
        for event in engine.sample(request, conditioned):
            if isinstance(event, Clip):
                break
            assert isinstance(event, Step)
            latents = event.denoised
    return latents, memory.peak


def test_each_level_takes_less_memory_and_placement_changes_no_bit(request_: Request) -> None:
    engine = Engine.load(tiny_spec(), device="cpu")
    assert [(level.tile, level.placement) for level in engine.levels] == [
        (None, "all"),
        (256, "all"),
        (256, "core"),
        (256, "partly"),
        (256, "streamed"),
        (128, "streamed"),
    ]
    made = []
    for number in range(len(engine.levels)):
        engine.take_level(number)
        made.append(first_section(engine, request_))
    latents, peaks = zip(*made, strict=True)
    assert all(torch.equal(latents[0], others) for others in latents[1:])
    assert peaks[1] < peaks[0] * 0.8
    assert peaks[5] < peaks[1] * 0.8
    engine.take_level(0)
    again, _ = first_section(engine, request_)
    assert torch.equal(again, latents[0]), "what was streamed can stay again"
