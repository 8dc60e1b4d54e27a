"""The attention backends: refused with a remedy, or computing the same within rounding."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from framepack_core.engine import Clip, Engine
from framepack_core.errors import ModelError
from framepack_core.networks.attention import choose_attention
from framepack_core.request import Request
from tests.conftest import tiny_spec

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_by_default_pytorch_chooses_the_attention_backend() -> None:
    assert choose_attention("auto", CPU) == choose_attention("auto", GPU) == "native"


@pytest.mark.parametrize(
    ("name", "device", "words"),
    [
        ("fast", GPU, "attention must be auto or one of flash, .*, got 'fast'"),
        ("flash", CPU, 'attention = "flash" needs a GPU: set it to "auto"'),
        ("flash", GPU, "cannot be used .*flash-attn.*: install what is missing, or set attention = "),
        ("sage", GPU, "cannot be used .*sageattention"),
        ("xformers", GPU, "cannot be used .*xformers"),
        ("_flash_3_hub", GPU, "cannot be used .*pip install kernels"),
        ("_native_cudnn", GPU, "needs cuDNN 9.15.1"),
    ],
)
def test_a_backend_that_does_not_work_here_is_refused_with_a_remedy(
    name: str, device: torch.device, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    with pytest.raises(ModelError, match=words):
        choose_attention(name, device)


def test_cudnn_attention_is_allowed_only_from_the_first_correct_version(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91501)
    assert choose_attention("_native_cudnn", GPU) == "_native_cudnn"


def test_another_backend_computes_the_same_video(tmp_path: Path) -> None:
    Image.linear_gradient("L").convert("RGB").save(tmp_path / "image.png")
    small = {"seconds": 1, "latent_window_size": 1, "steps": 2, "width": 32, "height": 32}
    request = Request.model_validate({"image": tmp_path / "image.png", "prompt": "a cat", **small})

    def latents(attention: str) -> torch.Tensor:
        engine = Engine.load(tiny_spec(), device="cpu", attention=attention)
        backends = {
            str(block.attn.processor._attention_backend)
            for block in (
                *engine.core.blocks.transformer_blocks,
                *engine.core.blocks.single_transformer_blocks,
            )
        }
        assert len(backends) == 1
        *_, clip = engine.generate(request)
        assert isinstance(clip, Clip)
        return clip.latents

    assert (latents("auto") - latents("_native_math")).abs().max() < 1e-4
