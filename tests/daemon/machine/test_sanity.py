"""The sanity check: faults that are planted are found, and rounding is none."""

import json
import runpy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from framepack_core.engine import Engine, Step
from framepack_core.errors import ModelError
from framepack_core.media import pictures
from framepack_core.media.pictures import Frames
from framepack_core.models.registry import BUILT_IN
from framepack_core.request import Request
from framepackd.machine import sanity
from framepackd.machine.sanity import Made
from framepackd.settings.config import Config
from framepackd.settings.tables import ModelConfig
from tests.golden import TINY_MODELS

ROOT = Path(__file__).parents[3]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.load(BUILT_IN["demo"], "cpu", "float32")


def problems(engine: Engine, request: Request | None = None) -> list[str]:
    """Sample the section, and compare its latents; nothing is decoded, which takes longest."""
    expected = json.loads(sanity.FINGERPRINT.read_text())
    for event in engine.generate(request or sanity.request(small=True)):
        if isinstance(event, Step) and event.step == event.steps:
            latents = event.progress.sampled[0].flatten()[:: sanity.LATENT_STRIDE].double().numpy()
            return sanity.compare({"latents": latents, "pixels": np.array(expected["pixels"])}, CPU)
    raise AssertionError("no step")


@contextmanager
def changed(parameter: torch.nn.Parameter, change: Callable[[torch.Tensor], object]) -> Iterator[None]:
    before = parameter.detach().clone()
    with torch.no_grad():
        change(parameter)
    yield
    with torch.no_grad():
        parameter.copy_(before)


def test_the_fingerprint_is_of_the_model_and_the_picture_that_are_bundled() -> None:
    recorded = json.loads(sanity.FINGERPRINT.read_text())["made_from"]
    assert recorded == sanity.made_from(), f"record it anew: {sanity.RECORD}"


def test_with_other_files_than_were_recorded_nothing_is_said_of_the_machine(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    record = json.loads(sanity.FINGERPRINT.read_text()) | {"made_from": "0" * 64}
    other = tmp_path / "fingerprint.json"
    other.write_text(json.dumps(record))
    monkeypatch.setattr(sanity, "FINGERPRINT", other)
    (found,) = problems(engine)
    assert "are not those that the fingerprint was recorded from" in found
    assert "something computes wrongly" not in found


@pytest.mark.long
def test_it_is_recorded_anew_by_one_command(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    anew = tmp_path / "fingerprint.json"
    python, script = sanity.RECORD.split()
    assert python == "python"
    monkeypatch.setattr(sys, "argv", [script, str(anew)])
    threads = torch.get_num_threads()
    runpy.run_path(str(ROOT / script), run_name="__main__")  # here torch is imported already
    torch.set_num_threads(threads)
    monkeypatch.setattr(sanity, "FINGERPRINT", anew)
    assert problems(engine) == []
    assert sanity.RECORD in (ROOT / "docs/operations.md").read_text()


def test_the_video_is_the_recorded_one_with_other_rounding_too(engine: Engine) -> None:
    assert problems(engine) == []
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert problems(engine) == []
    finally:
        torch.set_num_threads(threads)
    assert problems(Engine.load(BUILT_IN["demo"], "cpu", "float32", attention="_native_math")) == []


@pytest.mark.parametrize(
    "change",
    [
        lambda parameter: parameter.zero_(),
        lambda parameter: parameter.mul_(1.02),
        lambda parameter: parameter[0, 0].add_(1),
    ],
    ids=["nothing", "two percent too much", "one weight"],
)
def test_a_layer_that_computes_wrongly_is_found(
    engine: Engine, change: Callable[[torch.Tensor], object]
) -> None:
    with changed(engine.core.blocks.transformer_blocks[0].attn.to_v.weight, change):
        (found,) = problems(engine)
    assert "latents differ from the recorded ones" in found
    assert "something computes wrongly here" in found


@pytest.mark.parametrize(
    "settings", [{"guidance_scale": 9.99}, {"steps": sanity.STEPS - 1}, {"seed": 1}, {"prompt": "The clouds"}]
)
def test_a_step_with_the_wrong_inputs_is_found(engine: Engine, settings: dict[str, object]) -> None:
    assert problems(engine, sanity.request(small=True).model_copy(update=settings))


def test_a_solver_of_lower_order_is_found(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    from framepack_core.sampling import unipc

    monkeypatch.setattr(unipc, "SOLVER_ORDER", unipc.SOLVER_ORDER - 1)
    assert problems(engine)


def test_other_precisions_are_told_from_float32() -> None:
    assert problems(Engine.load(BUILT_IN["demo"], "cpu", "float32", "fp8"))


def test_a_decoder_that_computes_wrongly_is_found_by_its_pixels(engine: Engine) -> None:
    assert sanity.compare(sanity.samples(sanity.generate(engine, sanity.request(small=True))), CPU) == []
    *_, last = engine.models.vae.decoder.parameters()  # the bias of the last layer
    with changed(last, lambda bias: bias.add_(0.02)):
        (found,) = sanity.compare(sanity.samples(sanity.generate(engine, sanity.request(small=True))), CPU)
    assert found.startswith("pixels differ")


# of other models


def picture() -> pictures.Picture:
    return pictures.crop_to(pictures.open_picture(sanity.request().image), (256, 256))


def drifting(frames: int = 9) -> Frames:
    return np.stack([np.roll(picture(), 2 * number, axis=1) for number in range(frames)])


def made(frames: Frames, latents: float = 0.0, *, finite: bool = True) -> Made:
    return Made(frames, torch.full((1, 16, 1, 4, 4), latents), finite, (1.0,), 1.0)


def test_a_plausible_video_passes() -> None:
    assert sanity.judge(made(drifting()), picture()) == []


@pytest.mark.parametrize(
    ("video", "said"),
    [
        (made(np.zeros((9, 256, 256, 3), np.uint8)), "black"),
        (made(np.stack([picture()] * 9)), "frozen"),
        (made(np.random.default_rng(0).integers(0, 255, (9, 256, 256, 3), np.uint8)), "noise"),
        (made(drifting(), finite=False), "not finite"),
        (made(drifting(), latents=float("nan")), "latents hold NaN"),
        (made(255 - drifting()), "the first frame is not the picture"),
    ],
    ids=["black", "frozen", "noise", "pixels", "latents", "another picture"],
)
def test_an_implausible_one_does_not(video: Made, said: str) -> None:
    assert any(said in problem for problem in sanity.judge(video, picture()))


def test_only_the_bundled_model_itself_has_a_fingerprint() -> None:
    assert sanity.is_demo(BUILT_IN["demo"])
    assert not sanity.is_demo(BUILT_IN["framepack"])


def test_a_report_says_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    small = sanity.request(small=True)
    monkeypatch.setattr(sanity, "request", lambda **_: small)
    tiny = ModelConfig(  # its weights are random: what it makes is noise
        kind="framepack",
        transformer=str(TINY_MODELS / "framepack-i2v"),
        base=str(TINY_MODELS / "hunyuanvideo"),
        image_encoder=str(TINY_MODELS / "flux_redux"),
    )
    report = sanity.sanity_check(Config(models={"tiny": tiny}), "tiny")
    assert not report.fine
    wrong = [found for fine, _, found in report.findings() if fine is False]
    assert any("the first frame is not the picture" in found for found in wrong)
    assert report.sheet is not None
    assert report.sheet.shape == (64, 64 * 6, 3)


def test_a_model_that_does_not_exist_is_reported() -> None:
    with pytest.raises(ModelError, match=r"must be one of demo, demo-f1, f1, framepack, got 'nope'$"):
        sanity.sanity_check(Config(), "nope")
