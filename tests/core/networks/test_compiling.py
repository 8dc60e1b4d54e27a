"""Compiled blocks compute the same within rounding, and can be switched off; what they lack is reported."""

import re
import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import torch
from PIL import Image

from framepack_core.engine import Clip, Engine
from framepack_core.errors import ModelError
from framepack_core.memory.footprint import Precision
from framepack_core.networks import compiling
from framepack_core.request import Request
from tests.conftest import tiny_spec
from tests.core.models.loras import make_lora, stored

CPU, GPU = torch.device("cpu"), torch.device("cuda")


BF16 = torch.bfloat16


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """Pretend that everything that compiling on a GPU needs is here."""
    (tmp_path / "Python.h").touch()
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(compiling, "find_spec", lambda name: name)
    monkeypatch.setattr(compiling, "find_library", lambda name: name)
    monkeypatch.setattr(sysconfig, "get_paths", lambda **_: {"include": str(tmp_path)})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 6))
    return monkeypatch


@pytest.mark.parametrize(
    ("wanted", "device", "sections", "precision", "compiled"),
    [
        ("auto", GPU, 2, "exact", False),
        ("auto", GPU, 3, "exact", True),
        ("auto", GPU, 3, "fp8", True),
        ("auto", GPU, 3, "nf4", False),
        ("auto", CPU, 50, "exact", False),
        (True, CPU, 1, "exact", True),
        (False, GPU, 50, "exact", False),
    ],
)
def test_long_videos_on_a_gpu_are_compiled_unless_set_otherwise(
    wanted: bool | Literal["auto"],
    device: torch.device,
    sections: int,
    precision: Precision,
    compiled: bool,
    tools: pytest.MonkeyPatch,
) -> None:
    assert compiling.decide(wanted, device, sections, dtype=BF16, precision=precision) is compiled


LACKING: dict[str, tuple[Callable[[pytest.MonkeyPatch, Path], None], str]] = {
    "triton": (
        lambda tools, _: tools.setattr(compiling, "find_spec", lambda _: None),
        "triton: install a torch for CUDA",
    ),
    "a compiler": (
        lambda tools, _: tools.setattr(shutil, "which", lambda _: None),
        r"a compiler \(gcc or clang\): install gcc and g\+\+",
    ),
    "the compiler that is named": (
        lambda tools, _: (
            tools.setenv("CC", "icc"),
            tools.setattr(shutil, "which", lambda name: None if name == "icc" else name),
        )[0],
        r"a compiler \(icc\): install gcc and g\+\+, or correct CC in the environment",
    ),
    "Python's headers": (
        lambda _, folder: (folder / "Python.h").unlink(),
        r"Python's headers \(.*/Python\.h\): install python3-dev",
    ),
    "a card for bfloat16": (
        lambda tools, _: tools.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5)),
        r"a card of compute capability 8\.0 for bfloat16, this one has 7\.5",
    ),
    "the driver's library": (
        lambda tools, _: tools.setattr(compiling, "find_library", lambda _: None),
        r"the driver's library \(libcuda\.so\.1\): run ldconfig",
    ),
}


@pytest.mark.parametrize("lacking", LACKING)
def test_what_compiling_lacks_is_named_with_a_remedy_and_nothing_is_compiled(
    lacking: str, tools: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Only a compiler and triton were checked: without Python's headers, often missing, jobs failed."""
    take_away, said = LACKING[lacking]
    take_away(tools, tmp_path)
    compiling.warn_once.cache_clear()
    for _ in range(2):
        assert not compiling.decide("auto", GPU, 50, dtype=BF16)
    (record,) = caplog.records  # once
    assert re.search(f"not compiled, which is slower: compiling needs {said}", record.getMessage())
    with pytest.raises(ModelError, match=f'compile = true needs {said}.*or set compile = "auto"'):
        compiling.decide(True, GPU, 1, dtype=BF16)


def test_turing_compiles_float16_and_the_cpu_needs_no_card(
    tools: pytest.MonkeyPatch,
) -> None:
    tools.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert compiling.missing(GPU, torch.float16) is None
    tools.setattr(compiling, "find_spec", lambda _: None)
    assert compiling.missing(CPU, BF16) is None


def test_the_drivers_library_is_searched_where_triton_searches_it(
    tools: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tools.setattr(compiling, "find_library", lambda _: None)
    (tmp_path / "libcuda.so.1").touch()
    tools.setenv("LD_LIBRARY_PATH", f"/nowhere:{tmp_path}")
    assert compiling.missing(GPU, BF16) is None


def test_failed_compiling_is_repeated_under_the_same_conditions_only_if_required(
    tools: pytest.MonkeyPatch,
) -> None:
    assert not compiling.decide("auto", GPU, 50, dtype=BF16, failed="no")
    assert compiling.decide(True, GPU, 50, dtype=BF16, failed="no")


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
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs, "merging must not compile again"
    engine.take_level(len(engine.levels) - 1)
    assert torch.equal(latents(48), compiled), "streamed as well"
    engine.compiled.on = False
    assert torch.equal(latents(48), eager)
