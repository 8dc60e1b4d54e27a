"""What only a GPU can show, on the tiny model."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from framepack_core.engine import Clip, Engine
from framepack_core.request import Request
from tests.conftest import tiny_spec

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU is here"),
]


def last_clip(image: Path, device: str, dtype: str) -> Clip:
    engine = Engine.load(tiny_spec(), device=device, dtype=dtype)
    request = Request(
        image=image, prompt="a cat", seconds=1, latent_window_size=3, steps=4, width=48, height=32
    )
    *_, clip = engine.generate(request)
    assert isinstance(clip, Clip)
    return clip


@pytest.fixture
def image(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 255, (40, 56, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    return tmp_path / "image.png"


def test_in_float32_the_gpu_computes_what_the_cpu_computes(image: Path) -> None:
    on_gpu, on_cpu = last_clip(image, "cuda", "float32"), last_clip(image, "cpu", "float32")
    assert (on_gpu.history - on_cpu.history).abs().max() < 1e-2


def test_in_the_dtypes_of_the_reference_it_runs_and_repeats_itself(image: Path) -> None:
    first, second = last_clip(image, "cuda", "auto"), last_clip(image, "cuda", "auto")
    assert torch.isfinite(first.history).all()
    assert torch.equal(first.history, second.history)
