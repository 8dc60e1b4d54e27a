"""Which device is chosen, and why another is refused, on simulated cards."""

from pathlib import Path

import pytest
import torch

from framepack_core.errors import DeviceError, ModelError
from framepack_core.memory import devices


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """Simulate an Ampere card and a torch that is built for it."""
    version = tmp_path / "version"
    version.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.14  Thu Feb 22 2024\n")
    monkeypatch.setattr(devices, "NVIDIA_VERSION", version)
    for name, answer in (
        ("is_available", True),
        ("device_count", 1),
        ("get_device_name", "NVIDIA GeForce RTX 3060"),
        ("get_device_capability", (8, 6)),
        ("get_arch_list", ["sm_75", "sm_80", "sm_90", "compute_90"]),
    ):
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    return monkeypatch


def gone(card: pytest.MonkeyPatch) -> None:
    card.setattr(torch.cuda, "is_available", lambda: False)
    card.setattr(torch.cuda, "device_count", lambda: 0)


def test_auto_is_the_gpu_that_is_there(card: pytest.MonkeyPatch) -> None:
    assert devices.choose_device("auto").type == "cuda"
    assert devices.choose_device("auto", gpu_expected=True).type == "cuda"


def test_auto_is_the_cpu_only_if_no_gpu_is_expected(card: pytest.MonkeyPatch) -> None:
    gone(card)
    assert devices.choose_device("auto").type == "cpu"
    with pytest.raises(
        DeviceError, match=r"'cuda' is not there \(0 CUDA .*; driver 550\.54\.14: .*nvidia-smi"
    ):
        devices.choose_device("auto", gpu_expected=True)


def test_the_missing_driver_or_torch_is_named(card: pytest.MonkeyPatch, tmp_path: Path) -> None:
    gone(card)
    card.setattr(devices, "NVIDIA_VERSION", tmp_path / "none")
    with pytest.raises(DeviceError, match="no NVIDIA driver is loaded"):
        devices.choose_device("cuda:0")
    card.setattr(torch.version, "cuda", None)
    with pytest.raises(DeviceError, match="is built without CUDA: install one"):
        devices.choose_device("cuda:0")


def test_a_missing_card_is_not_reported_as_an_unknown_device(card: pytest.MonkeyPatch) -> None:
    with pytest.raises(DeviceError, match=r"'cuda:1' is not there \(1 CUDA devices are"):
        devices.choose_device("cuda:1")
    with pytest.raises(ModelError, match="'gpu' is unknown") as error:
        devices.choose_device("gpu")
    assert not isinstance(error.value, DeviceError)


@pytest.mark.parametrize(
    ("capability", "built_for", "runs"),
    [
        ((8, 6), ["sm_80"], True),  # a later card of the same generation
        ((8, 0), ["sm_86"], False),
        ((12, 0), ["sm_80", "sm_90"], False),
        ((12, 0), ["sm_90", "compute_90"], True),  # translated by the driver
        ((6, 1), ["sm_75", "sm_80", "compute_90"], False),
        ((10, 0), ["sm_100a"], True),
        ((8, 6), [], True),
    ],
)
def test_a_card_that_torch_is_not_built_for_is_refused_before_its_first_kernel(
    card: pytest.MonkeyPatch, capability: tuple[int, int], built_for: list[str], *, runs: bool
) -> None:
    card.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    card.setattr(torch.cuda, "get_arch_list", lambda: built_for)
    if runs:
        assert devices.choose_device("cuda").type == "cuda"
        return
    with pytest.raises(
        DeviceError, match=rf"RTX 3060 has compute capability {capability[0]}\.{capability[1]}, and"
    ):
        devices.choose_device("cuda")


def test_a_device_is_described_with_driver_wheel_and_capability(card: pytest.MonkeyPatch) -> None:
    torches = f"torch {torch.__version__}"
    told = f"NVIDIA GeForce RTX 3060, compute capability 8.6, driver 550.54.14, {torches} for CUDA 12.8"
    assert devices.describe(torch.device("cuda")) == told
    assert devices.describe(torch.device("cpu")) == f"cpu, {torches}"


def test_before_the_first_computation_only_a_bare_context_counts_as_ours(
    card: pytest.MonkeyPatch,
) -> None:
    """The libraries allocate their memory at the first computation: until then others could take it."""
    free, total, most = 8 << 30, 12 << 30, 0
    card.setattr(torch.cuda, "mem_get_info", lambda device: (free, total))
    card.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    card.setattr(torch.cuda, "max_memory_allocated", lambda device: most)
    found = devices.card(torch.device("cuda"))
    assert found is not None
    assert found.free - free == 128 << 20
    most = 1
    found = devices.card(torch.device("cuda"))
    assert found is not None
    assert found.free - free == 700 << 20
