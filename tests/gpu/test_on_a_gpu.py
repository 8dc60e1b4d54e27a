"""Tests that need a real GPU, with the tiny model."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from framepack_core.engine import Clip, Engine
from framepack_core.networks import fp8
from framepack_core.progress import Progress
from framepack_core.request import Lora, Request
from framepack_core.sampling.unipc import SolverState
from tests.conftest import tiny_spec
from tests.core.models.loras import make_lora, stored

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
    assert (on_gpu.latents - on_cpu.latents).abs().max() < 1e-2


def test_in_the_references_dtypes_a_video_is_reproducible(image: Path) -> None:
    first, second = last_clip(image, "cuda", "auto"), last_clip(image, "cuda", "auto")
    assert torch.isfinite(first.latents).all()
    assert torch.equal(first.latents, second.latents)


def test_every_placement_gives_the_same_bits(image: Path) -> None:
    """Only on a GPU do copies run during computing: a block that did not wait for its weights would show."""
    request = Request(
        image=image, prompt="a cat", seconds=1, latent_window_size=3, steps=4, width=48, height=32
    )
    for tiling in (True, False):
        engine = Engine.load(tiny_spec(), device="cuda", tiling=tiling)
        made = []
        for number, level in enumerate(engine.levels):
            if level.tile != 128:
                engine.take_level(number)
                *_, clip = engine.generate(request)
                assert isinstance(clip, Clip)
                made.append(clip.latents)
        assert len(made) == 4
        assert all(torch.equal(made[0], other) for other in made[1:])


def test_merged_loras_reach_the_gpu_on_every_level(image: Path, tmp_path: Path) -> None:
    make_lora(tmp_path / "a.safetensors", "kohya-hunyuan", stored(tiny_spec()))
    plain = Request(
        image=image, prompt="a cat", seconds=1, latent_window_size=3, steps=4, width=48, height=32
    )
    merged = plain.model_copy(update={"loras": (Lora(file=tmp_path / "a.safetensors", weight=0.8),)})
    for precision in ("exact", "fp8"):
        engine = Engine.load(tiny_spec(), device="cuda", precision=precision)
        made = []
        for number, level in enumerate(engine.levels):
            if level.tile != 128:
                engine.take_level(number)
                for request in (plain, merged, plain, merged):
                    *_, clip = engine.generate(request)
                    assert isinstance(clip, Clip)
                    made.append(clip.latents)
        assert not torch.equal(made[0], made[1])
        assert all(torch.equal(made[number % 2], other) for number, other in enumerate(made))


@pytest.mark.skipif(
    not (torch.cuda.is_available() and torch.cuda.get_device_capability() >= fp8.CAPABILITY),
    reason="this GPU does not multiply in 8 bits",
)
@pytest.mark.parametrize("length", [1, 100, 18325])
@pytest.mark.parametrize(("columns", "rows"), [(3072, 9216), (15360, 3072)])
def test_multiplying_in_8_bits_is_as_exact_as_on_the_cpu(length: int, columns: int, rows: int) -> None:
    device = torch.device("cuda")
    assert fp8.multiplies(device, torch.bfloat16)
    torch.manual_seed(1)
    linear = nn.Linear(columns, rows, dtype=torch.bfloat16, device=device).requires_grad_(requires_grad=False)
    small = fp8.Fp8Linear(linear)
    inputs = torch.randn(1, length, columns, dtype=torch.bfloat16, device=device)
    with torch.inference_mode():
        stands_for, exact = small(inputs), linear(inputs)
        small.multiplies = True
        made = small(inputs)
        compiled = torch.compile(small.forward, fullgraph=True, dynamic=True)(inputs)

    def off_by(found: torch.Tensor, wanted: torch.Tensor) -> float:
        return float((found.float() - wanted.float()).norm() / wanted.float().norm())

    assert off_by(stands_for, exact) < 0.03
    assert off_by(made, exact) < 0.05
    assert off_by(compiled, made) < 0.01


def test_page_locked_blocks_are_streamed_to_the_same_bits(image: Path) -> None:
    engine = Engine.load(tiny_spec(), device="cuda")
    expected = last_clip(image, "cuda", "auto").latents
    engine.take_level(len(engine.levels) - 2)
    assert all(weight.is_pinned() for weight in engine.core.blocks.parameters())
    assert engine.models.text_encoder.layers[0].mlp.up_proj.weight.device.type == "cpu"
    request = Request(
        image=image, prompt="a cat", seconds=1, latent_window_size=3, steps=4, width=48, height=32
    )
    *_, clip = engine.generate(request)
    assert isinstance(clip, Clip)
    assert torch.equal(clip.latents, expected)


def test_a_copy_to_the_host_holds_the_values_at_the_time_of_the_call() -> None:
    """The copy runs during computing: it must neither start too early nor read reused memory."""
    latents = torch.randn(1, 16, 9, 80, 76, device="cuda")
    copies, expected = [], []
    for number in range(20):
        for _ in range(50):
            latents = latents.sin() + number
        progress = Progress(Progress.start(1).noise, solver=SolverState(number, latents, (latents * 2,)))
        copies.append(progress.to_host())
        expected.append(latents.sum())
        del progress
    for copy, total in zip(copies, expected, strict=True):
        solver = copy.wait().solver
        assert solver is not None
        assert solver.latents.device.type == "cpu"
        assert torch.equal(solver.denoised[0], solver.latents * 2)
        assert torch.isclose(solver.latents.cuda().sum(), total)
