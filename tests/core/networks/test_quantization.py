"""Blocks in fewer bits: how much smaller, and how near."""

import sys
from pathlib import Path

import pytest
import torch
from diffusers import HunyuanVideoFramepackTransformer3DModel

from benchmarks.transformer import FULL, weight_bytes
from framepack_core import sections
from framepack_core.engine import Engine, Step
from framepack_core.errors import ModelError
from framepack_core.memory import footprint
from framepack_core.models.registry import BUILT_IN
from framepack_core.networks import loading, quantization
from framepack_core.networks.fp8 import FP8
from framepack_core.networks.transformer import Blocks, split_transformer
from tests.conftest import tiny_spec
from tests.core.networks.inputs import SIGMAS, WINDOW, inputs, precompute
from tests.core.networks.precisions import BOTH, needs_bitsandbytes
from tests.core.requests import everything, request_for


def test_at_full_shape_fp8_takes_nine_gigabytes() -> None:
    with torch.device("meta"):
        transformer = HunyuanVideoFramepackTransformer3DModel(**FULL).to(torch.bfloat16)
    core, _ = split_transformer(transformer)
    quantization.reduce(core.blocks, "fp8", torch.bfloat16)
    assert weight_bytes(core) == pytest.approx(9.1e9, rel=0.01)


@pytest.mark.parametrize(
    ("reduced", "off_by"), [("fp8", 0.1), pytest.param("nf4", 0.3, marks=needs_bitsandbytes)]
)
@torch.inference_mode()
def test_reduced_blocks_give_nearly_the_same_velocity(reduced: footprint.Precision, off_by: float) -> None:
    dtype = torch.float32
    transformer = loading.load(BUILT_IN["demo"], dtype=dtype, encoder_dtype=dtype).transformer
    core, embedders = split_transformer(transformer)
    given = inputs(transformer.config, dtype)
    precomputed = precompute(embedders, given, 6.0, dtype)
    tokens = core.history_tokens(sections.plan("framepack", 3, WINDOW)[1], given[-1])
    exact = core(given[0], precomputed, len(SIGMAS) - 2, tokens, None)
    quantization.reduce(core.blocks, reduced, dtype)
    near = core(given[0], precomputed, len(SIGMAS) - 2, tokens, None)
    assert 0 < (near - exact).norm() / exact.norm() < off_by


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_read_as_fp8_have_the_bits_of_weights_reduced_after_loading(dtype: torch.dtype) -> None:
    """Otherwise an fp8 file of 13 GB would take 26 GB of memory while it is loaded."""
    at_once = loading.load(tiny_spec(), dtype=dtype, encoder_dtype=dtype, precision="fp8").transformer
    later = loading.load(tiny_spec(), dtype=dtype, encoder_dtype=dtype).transformer
    kinds = {name: tensor.dtype for name, tensor in at_once.state_dict().items()}
    for transformer in (at_once, later):
        quantization.reduce(Blocks(transformer), "fp8", dtype)
    held, expected = at_once.state_dict(), later.state_dict()
    assert {name: tensor.dtype for name, tensor in held.items()} == kinds
    assert all(torch.equal(held[name].float(), tensor.float()) for name, tensor in expected.items())
    assert FP8 in kinds.values()


@pytest.mark.parametrize("reduced", BOTH)
def test_a_video_with_reduced_weights_resumes_with_the_same_bits(
    reduced: footprint.Precision, tmp_path: Path
) -> None:
    engine = Engine.load(BUILT_IN["demo"], device="cpu", precision=reduced)
    request = request_for(tmp_path)
    events = list(engine.generate(request))
    third = events[2]
    assert isinstance(third, Step)
    assert everything(list(engine.generate(request, resume=third.progress))) == everything(events[3:])


def test_without_bitsandbytes_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.nn", None)
    with pytest.raises(ModelError, match=r'pip install "framepackd\[nf4\]"'):
        Engine.load(tiny_spec(), device="cpu", precision="nf4")
