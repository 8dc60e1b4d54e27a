"""The engine on a played GPU: the bits of the CPU, and no operation out of order."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from framepack_core.engine import Clip, Engine, Step
from framepack_core.memory.footprint import Precision, Video, memory_levels
from framepack_core.memory.streaming import PIECE
from framepack_core.networks import fp8
from framepack_core.progress import Progress
from framepack_core.request import Lora, Request
from tests.conftest import tiny_spec
from tests.core.models.loras import latents, make_lora, stored
from tests.played.cards import H100_80
from tests.played.gpu import PlayedGpu
from tests.played.models import Run, picture, planner, played, run, tiny_models
from tests.played.tensors import CPU, CUDA

KINDS = ("framepack-i2v", "framepack-f1")
SMALL = {"prompt": "a cat", "seconds": 1, "latent_window_size": 3, "steps": 3, "width": 48, "height": 32}
SETTINGS: dict[str, dict[str, Any]] = {
    "teacache": {"cache": "teacache", "steps": 6},
    "magcache": {"cache": "magcache", "steps": 9},
    "guided": {"true_cfg_scale": 3.0, "guidance_rescale": 0.5, "negative_prompt": "a dog", "steps": 2},
    "guided and cached": {"true_cfg_scale": 3.0, "cache": "teacache", "steps": 6},
    "with an end": {"end_image": "end.png", "steps": 2},
}
VIDEO = Video(32, 48)
LEVELS = memory_levels("auto", VIDEO)
CORE, STREAMED = (
    next(number for number, level in enumerate(LEVELS) if level.placement == placement)
    for placement in ("core", "streamed")
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    picture(folder)
    picture(folder, "end.png", seed=1)
    for seed in (1, 2):
        make_lora(folder / f"{seed}.safetensors", "diffusers", stored(tiny_spec()), seed=seed)
    return folder


def request_for(folder: Path, **settings: Any) -> Request:
    given = {"image": "image.png", **SMALL, **settings}
    paths = {key: folder / given[key] for key in ("image", "end_image") if key in given}
    return Request.model_validate(given | paths)


class Made:
    """Videos made on the CPU in the dtypes of a GPU, each made once."""

    def __init__(self) -> None:
        self._engines: dict[tuple[str, Precision], Engine] = {}
        self._clips: dict[Any, Clip] = {}

    def __call__(self, kind: str, request: Request, precision: Precision = "exact") -> Clip:
        key = kind, precision, request.model_dump_json()
        if key not in self._clips:
            engine = self._engines.get((kind, precision))
            if engine is None:
                engine = self._engines[kind, precision] = engine_for(CPU, kind, precision)
            *_, clip = engine.generate(request)
            assert isinstance(clip, Clip)
            self._clips[key] = clip
        return self._clips[key]


@pytest.fixture(scope="module")
def on_the_cpu() -> Made:
    return Made()


def engine_for(
    device: torch.device, kind: str = KINDS[0], precision: Precision = "exact", level: int = 0
) -> Engine:
    models = tiny_models(kind, precision)
    if device == CUDA:
        models = played(models)
    engine = Engine(
        models, device, planner(device, precision, room=2 * PIECE), pinnable=True, precision=precision
    )
    engine.prepare(VIDEO, level=level)
    return engine


def assert_same(made: Run, expected: Clip) -> None:
    assert made.clip is not None
    assert torch.equal(made.clip.latents, expected.latents)
    assert np.array_equal(made.clip.frames, expected.frames)
    assert made.clip.finite
    for number, tensor in enumerate(made.clip.progress.sampled):
        assert torch.equal(tensor, expected.progress.sampled[number])


@pytest.fixture(scope="module")
def streamed() -> Callable[[str], tuple[PlayedGpu, Engine]]:
    """Give a played GPU and an engine whose weights are streamed to it, one per model."""

    @cache
    def made(kind: str) -> tuple[PlayedGpu, Engine]:
        with PlayedGpu(H100_80) as gpu:
            return gpu, engine_for(CUDA, kind, level=STREAMED)

    return made


@pytest.mark.parametrize(
    ("kind", "levels"),
    [
        (KINDS[0], [*range(len(LEVELS)), 0]),
        pytest.param(KINDS[1], [CORE, CORE + 1, STREAMED], marks=pytest.mark.long),
    ],
)
def test_every_level_gives_the_same_bits(
    folder: Path, on_the_cpu: Made, kind: str, levels: list[int]
) -> None:
    request = request_for(folder, steps=2)
    expected = on_the_cpu(kind, request)
    with PlayedGpu(H100_80) as gpu:
        engine = engine_for(CUDA, kind)
        for level in levels:
            engine.take_level(level)
            assert_same(run(gpu, engine, request), expected)
    assert not gpu.faults


def test_during_sampling_the_card_holds_nothing_of_the_decoded_section(folder: Path) -> None:
    live = []
    with PlayedGpu(H100_80) as gpu:
        engine, request = engine_for(CUDA, level=STREAMED), request_for(folder, steps=2)
        for event in engine.generate(request):
            if isinstance(event, Step) and event.step == 1:
                live.append(gpu.memory.live)
            elif isinstance(event, Clip) and event.progress.edge is not None:
                assert event.progress.edge.device == CPU
            del event
    assert len(live) > 1
    assert max(live[1:]) <= live[0]


@pytest.mark.parametrize("kind", [KINDS[0], pytest.param(KINDS[1], marks=pytest.mark.long)])
@pytest.mark.parametrize("settings", SETTINGS)
def test_caches_guidance_and_an_end_frame_give_the_same_bits_on_every_level(
    folder: Path,
    on_the_cpu: Made,
    streamed: Callable[[str], tuple[PlayedGpu, Engine]],
    kind: str,
    settings: str,
) -> None:
    if kind == "framepack-f1" and settings == "with an end":
        return  # it is refused
    gpu, engine = streamed(kind)
    request = request_for(folder, **SETTINGS[settings])
    with gpu:
        made = run(gpu, engine, request)
    assert_same(made, on_the_cpu(kind, request))
    if settings in ("teacache", "magcache"):
        assert not all(step.computed for step in made.steps), "the cache is at work"
    assert not gpu.faults


def test_resuming_from_a_progress_in_host_memory_gives_the_same_bits(
    folder: Path, on_the_cpu: Made, streamed: Callable[[str], tuple[PlayedGpu, Engine]]
) -> None:
    gpu, engine = streamed("framepack-i2v")
    request = request_for(folder, **SETTINGS["guided and cached"])
    expected = on_the_cpu("framepack-i2v", request)
    with gpu:
        first = run(gpu, engine, request, leave=at(1, 4))
        with gpu.during("copies"):
            progress = first.steps[-1].progress.to_host().wait()
        assert progress.solver is not None
        assert progress.solver.latents.device == CPU
        assert_same(run(gpu, engine, request, progress), expected)
    assert not gpu.faults


def at(section: int, step: int) -> Callable[[Step | Clip], bool]:
    """Say when to leave."""
    return lambda event: isinstance(event, Step) and (event.section, event.step) == (section, step)


PLACEMENTS = pytest.mark.parametrize(
    "level",
    [*(pytest.param(level, marks=pytest.mark.long) for level in range(CORE, STREAMED)), STREAMED],
    ids=lambda level: LEVELS[level].placement,
)


@PLACEMENTS
def test_loras_are_merged_and_switched_as_on_the_cpu(folder: Path, level: int) -> None:
    loras = [Lora(file=folder / f"{seed}.safetensors", weight=0.8) for seed in (1, 2)]
    plain = engine_for(CPU)
    with PlayedGpu(H100_80) as gpu:
        engine = engine_for(CUDA, level=level)
    for merged in ((), loras[:1], loras[1:], loras, ()):
        request = request_for(folder, loras=tuple(merged))
        with gpu:
            step = run(gpu, engine, request, leave=at(0, 1)).steps[0].denoised.cpu()
        assert torch.equal(step, latents(plain, request))
    assert not gpu.faults


@PLACEMENTS
def test_reduced_weights_give_the_same_bits_on_every_level(
    folder: Path, on_the_cpu: Made, level: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The CPU has the product in 8 bits too, which it is not asked for otherwise.
    monkeypatch.setattr(fp8, "multiplies", lambda _, dtype: dtype == torch.bfloat16)
    request = request_for(folder, steps=2)
    with PlayedGpu(H100_80) as gpu:
        engine = engine_for(CUDA, precision="fp8", level=level)
        assert_same(run(gpu, engine, request), on_the_cpu("framepack-i2v", request, "fp8"))
    assert not gpu.faults


@pytest.mark.parametrize(
    "level", [1, *(pytest.param(level, marks=pytest.mark.long) for level in range(2, STREAMED))]
)
def test_after_memory_runs_out_the_next_level_continues_with_the_same_bits(
    folder: Path, on_the_cpu: Made, level: int
) -> None:
    request = request_for(folder, steps=2)
    with PlayedGpu(H100_80) as gpu:
        engine = engine_for(CUDA, level=level)
        run(gpu, engine, request)
        peaks = gpu.memory.peaks["held"]
        gpu.memory.capacity = max(peaks[phase] for phase in ("first step", "last step", "decode")) - 1
        reached: list[Progress] = []

        def note(event: Step | Clip) -> bool:
            reached.append(event.progress)
            return False

        with pytest.raises(torch.OutOfMemoryError):
            run(gpu, engine, request, leave=note)
        engine.take_level(level + 1)
        assert LEVELS[level + 1].tile == LEVELS[level].tile
        made = run(gpu, engine, request, reached[-1] if reached else None)
    assert_same(made, on_the_cpu("framepack-i2v", request))
    assert not gpu.faults
