"""Compiled blocks compute the same within rounding, and can be switched off; who cannot have them is told."""

import shutil
from pathlib import Path
from typing import Literal

import pytest
import torch
from PIL import Image

from framepack_core import compiling
from framepack_core.engine import Clip, Engine
from framepack_core.errors import ModelError
from framepack_core.request import Request
from tests.conftest import tiny_spec
from tests.core.loras import make_lora, stored

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(compiling, "find_spec", lambda name: name)
    return monkeypatch


@pytest.mark.parametrize(
    ("wanted", "device", "sections", "exact", "compiled"),
    [
        ("auto", GPU, 2, True, False),
        ("auto", GPU, 3, True, True),
        ("auto", GPU, 3, False, False),
        ("auto", CPU, 50, True, False),
        (True, CPU, 1, True, True),
        (False, GPU, 50, True, False),
    ],
)
def test_long_videos_on_a_gpu_are_compiled_unless_set_otherwise(
    wanted: bool | Literal["auto"],
    device: torch.device,
    sections: int,
    exact: bool,
    compiled: bool,
    tools: pytest.MonkeyPatch,
) -> None:
    assert compiling.decide(wanted, device, sections, exact=exact) is compiled


def test_without_a_compiler_nothing_is_compiled_and_who_wants_it_is_told(tools: pytest.MonkeyPatch) -> None:
    tools.setattr(shutil, "which", lambda _: None)
    assert not compiling.decide("auto", GPU, 50, exact=True)
    with pytest.raises(
        ModelError, match=r'compile = true needs a C\+\+ compiler \(g\+\+\): set compile = "auto"'
    ):
        compiling.decide(True, CPU, 1, exact=True)
    tools.setattr(compiling, "find_spec", lambda _: None)
    with pytest.raises(ModelError, match="needs triton"):
        compiling.decide(True, GPU, 1, exact=True)
    with pytest.raises(ModelError, match="needs weights as they were published"):
        compiling.decide(True, GPU, 1, exact=False)


@pytest.mark.long
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler is here")
def test_compiled_blocks_compute_the_same_within_rounding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "restored after the test")
    compiling.set_up(tmp_path / "compiled")
    Image.linear_gradient("L").convert("RGB").save(tmp_path / "image.png")
    engine = Engine.load(tiny_spec(), device="cpu")

    make_lora(tmp_path / "a.safetensors", "kohya-hunyuan", stored(tiny_spec()))

    def latents(width: int, **settings: object) -> torch.Tensor:
        small = settings | {"seconds": 1, "latent_window_size": 1, "steps": 1, "width": width, "height": 32}
        request = Request.model_validate({"image": tmp_path / "image.png", "prompt": "a cat", **small})
        for event in engine.generate(request):
            if isinstance(event, Clip):
                return event.latents
        raise AssertionError("a clip follows the steps")

    eager = latents(48)
    engine.compiled.on = True
    compiled = latents(48)
    assert 0 < (compiled - eager).abs().max() < 1e-4
    assert any((tmp_path / "compiled").rglob("*.so")), "it is kept"
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    latents(64)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs, "one serves all sizes"
    merged = latents(48, loras=[{"file": tmp_path / "a.safetensors"}])
    assert (merged - compiled).abs().max() > 1e-3
    assert torch.equal(latents(48), compiled)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs, "merging compiles nothing anew"
    engine.take_rung(len(engine.rungs) - 1)
    assert torch.equal(latents(48), compiled), "streamed as well"
    engine.compiled.on = False
    assert torch.equal(latents(48), eager)
