"""Warnings about weak cards and faulty libraries, on simulated ones."""

import pytest
import torch

from framepack_core.memory import device_support

GPU = torch.device("cuda")


def told(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int] = (8, 9),
    cudnn: int | None = 91900,
    dtype: torch.dtype = torch.bfloat16,
) -> str:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA GeForce RTX 2080 Ti")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: cudnn)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    return "\n".join(device_support.warnings(GPU, dtype))


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (9, 0), (12, 0)])
def test_a_card_with_bfloat16_and_a_good_cudnn_gets_no_warning(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]
) -> None:
    assert told(monkeypatch, capability) == ""


@pytest.mark.parametrize("capability", [(7, 5), (7, 0), (6, 1)])
def test_a_card_without_bfloat16_gets_a_warning(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]
) -> None:
    said = told(monkeypatch, capability)
    assert f"RTX 2080 Ti has compute capability {capability[0]}.{capability[1]}, and bfloat16 needs" in said
    assert 'dtype = "float32"' in said
    assert told(monkeypatch, capability, dtype=torch.float32) == "", "float32 is not emulated"


def test_float16_which_makes_black_videos_gets_a_warning_on_any_card(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for capability in ((7, 5), (9, 0)):
        assert "makes black videos" in told(monkeypatch, capability, dtype=torch.float16)


@pytest.mark.parametrize(
    ("version", "named"), [(90800, "9.8.0"), (91002, "9.10.2"), (91400, "9.14.0"), (90701, ""), (91500, "")]
)
def test_a_cudnn_that_torch_does_not_use_is_named_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, version: int, named: str
) -> None:
    said = told(monkeypatch, cudnn=version)
    assert bool(said) == bool(named)
    if named:
        assert f"cuDNN {named} computes 3D convolutions" in said
        assert "pip install 'nvidia-cudnn-cu13>=9.15'" in said


def test_without_cudnn_or_a_gpu_there_is_no_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    assert told(monkeypatch, cudnn=None) == ""
    assert device_support.warnings(torch.device("cpu"), torch.float16) == []
