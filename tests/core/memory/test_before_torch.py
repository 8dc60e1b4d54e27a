"""Which card a process sees, and the settings of its allocator, on simulated machines."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from framepack_core.errors import DeviceError
from framepack_core.memory import before_torch, devices

FIRST, SECOND, THIRD = (f"GPU-{digit * 8}-1234-1234-1234-123456789abc" for digit in "abc")
ALLOCATOR = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
SetUp = Callable[..., dict[str, str]]


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Simulate a driver without cards, on a Linux outside of Windows, with nothing set up."""
    kernel = tmp_path / "osrelease"
    kernel.write_text("6.8.0-45-generic\n")
    monkeypatch.setattr(before_torch, "CARDS", tmp_path / "gpus")
    monkeypatch.setattr(before_torch, "KERNEL", kernel)
    monkeypatch.setattr(before_torch, "names_here", {})
    return tmp_path / "gpus"


@pytest.fixture
def set_up(cards: Path, monkeypatch: pytest.MonkeyPatch) -> SetUp:
    """Give a function that sets the environment up as before torch is imported, and returns it."""

    def of(device: str, **environment: str) -> dict[str, str]:
        with monkeypatch.context() as patched:
            patched.delitem(sys.modules, "torch")
            before_torch.set_up(device, environment)
        return environment

    return of


def add_card(
    cards: Path, location: str, uuid: str, excluded: str = "No", model: str = "NVIDIA GeForce RTX 4090"
) -> None:
    folder = cards / location
    folder.mkdir(parents=True)
    (folder / "information").write_text(
        f"Model: \t\t {model}\n"
        "IRQ:   \t\t 150\n"
        f"GPU UUID: \t {uuid}\n"
        "Video BIOS: \t 95.02.3c.40.b8\n"
        "Bus Type: \t PCIe\n"
        f"Bus Location: \t {location}\n"
        "Device Minor: \t 1\n"
        f"GPU Excluded:\t {excluded}\n"
    )


@pytest.fixture
def three(cards: Path) -> None:
    add_card(cards, "0000:c1:00.0", THIRD)
    add_card(cards, "0000:21:00.0", SECOND)
    add_card(cards, "0000:05:00.0", FIRST)


def seen(environment: dict[str, str]) -> str | None:
    return environment.get("CUDA_VISIBLE_DEVICES")


@pytest.mark.usefixtures("three")
@pytest.mark.parametrize(("device", "uuid"), [("cuda:0", FIRST), ("cuda:1", SECOND), ("cuda:2", THIRD)])
def test_a_card_is_found_by_its_number_in_nvidia_smi_and_is_the_only_visible_one(
    set_up: SetUp, device: str, uuid: str
) -> None:
    """Libraries made streams and contexts on the first card, while the second computed."""
    assert set_up(device) == ALLOCATOR | {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": uuid}
    assert before_torch.name_here(device) == "cuda:0"
    assert before_torch.name_outside("cuda:0") == device


@pytest.mark.usefixtures("three")
@pytest.mark.parametrize("device", ["auto", "cuda", "cpu"])
def test_without_a_number_cuda_chooses_the_fastest_card_itself(set_up: SetUp, device: str) -> None:
    assert set_up(device) == ALLOCATOR
    assert before_torch.name_here(device) == device
    assert before_torch.name_outside("cuda:0") == "cuda:0"


@pytest.mark.usefixtures("three")
def test_a_missing_card_is_left_to_cuda_to_report(set_up: SetUp) -> None:
    assert seen(set_up("cuda:3")) is None
    assert before_torch.name_here("cuda:3") == "cuda:3"


def test_a_card_that_the_driver_excludes_is_not_counted(set_up: SetUp, cards: Path) -> None:
    add_card(cards, "0000:01:00.0", FIRST, excluded="Yes")
    add_card(cards, "0000:02:00.0", SECOND)
    assert seen(set_up("cuda:0")) == SECOND


@pytest.mark.parametrize("uuid", ["GPU-????????-????-????-????-????????????", "N/A", ""])
def test_without_a_uuid_the_number_is_used(set_up: SetUp, cards: Path, uuid: str) -> None:
    assert seen(set_up("cuda:1")) == "1", "no driver in /proc, as on Windows' Linux"
    add_card(cards, "0000:01:00.0", FIRST)
    add_card(cards, "0000:02:00.0", uuid)
    assert seen(set_up("cuda:1")) == "1"


@pytest.mark.usefixtures("three")
@pytest.mark.parametrize(
    ("listed", "device", "card"),
    [
        ("2,0", "cuda:0", "2"),
        ("2,0", "cuda:1", "0"),
        ("2,0", "cuda:2", "2,0"),
        (f"{THIRD}, {FIRST}", "cuda:1", FIRST),
        ("MIG-0a1b2c3d-1,MIG-0a1b2c3d-2", "cuda:1", "MIG-0a1b2c3d-2"),
        ("0,-1,1", "cuda:1", "0,-1,1"),  # entries after -1 are hidden
        ("", "cuda:0", ""),
    ],
)
def test_a_number_counts_through_the_users_list_of_visible_cards(
    set_up: SetUp, listed: str, device: str, card: str
) -> None:
    environment = set_up(device, CUDA_VISIBLE_DEVICES=listed)
    assert seen(environment) == card
    assert "CUDA_DEVICE_ORDER" not in environment, "their numbers mean what they meant"


@pytest.mark.usefixtures("three")
def test_for_all_devices_every_card_stays_visible_in_the_order_of_nvidia_smi(
    set_up: SetUp, three: None
) -> None:
    assert set_up("all") == {**ALLOCATOR, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    assert set_up("all", CUDA_VISIBLE_DEVICES="2,0") == {**ALLOCATOR, "CUDA_VISIBLE_DEVICES": "2,0"}


def test_the_users_order_of_devices_stays(set_up: SetUp) -> None:
    environment = set_up("cuda:1", CUDA_DEVICE_ORDER="FASTEST_FIRST")
    assert environment == ALLOCATOR | {"CUDA_DEVICE_ORDER": "FASTEST_FIRST", "CUDA_VISIBLE_DEVICES": "1"}


def test_the_users_settings_of_the_allocator_stay(set_up: SetUp) -> None:
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        own = {name: "max_split_size_mb:128"}
        assert set_up("auto", **own) == own


def test_on_windows_the_allocator_keeps_its_defaults(set_up: SetUp, tmp_path: Path) -> None:
    """Expandable segments fail there at the first allocation (pytorch issue 192330)."""
    (tmp_path / "osrelease").write_text("5.15.167.4-microsoft-standard-WSL2\n")
    assert set_up("auto") == {}


@pytest.mark.usefixtures("three")
def test_nothing_is_changed_after_torch_is_imported() -> None:
    environment: dict[str, str] = {}
    before_torch.set_up("cuda:1", environment)
    assert environment == {}
    assert before_torch.name_here("cuda:1") == "cuda:1"


@pytest.mark.usefixtures("three")
def test_the_process_sees_the_first_card_and_messages_name_the_configured_one(
    set_up: SetUp, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, answer in (
        ("is_available", True),
        ("device_count", 1),
        ("get_arch_list", []),
        ("get_device_capability", (8, 9)),
    ):
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    set_up("cuda:1")
    device = devices.choose_device("cuda:1")
    assert device == torch.device("cuda:0")
    assert devices.choose_device(str(device)) == device
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(DeviceError, match="device 'cuda:1' is not there"):
        devices.choose_device("cuda:1")


def test_a_worker_sees_one_card_before_torch_is_imported() -> None:
    """In a new process, as the daemon starts it: nothing before the setup may import torch."""
    code = (
        "import os, sys, framepackd.worker.main as worker\n"
        "worker.die_with = lambda parent: None\n"
        "worker.set_environment = lambda: (print('torch' in sys.modules, os.environ['CUDA_VISIBLE_DEVICES']),"
        " sys.exit())\n"
        "worker.main(None, 0, 'cuda:1')"
    )
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "5,6"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["False", "6"], done.stderr


def test_the_driver_says_the_name_of_a_card_before_torch_is_loaded(cards: Path) -> None:
    add_card(cards, "0000:01:00.0", FIRST, model="NVIDIA GeForce RTX 3060")
    add_card(cards, "0000:02:00.0", SECOND)
    names = [before_torch.card_name(f"cuda:{number}", {}) for number in range(3)]
    assert names == ["NVIDIA GeForce RTX 3060", "NVIDIA GeForce RTX 4090", None]
    assert before_torch.card_name("cuda:0", {"CUDA_VISIBLE_DEVICES": SECOND}) == "NVIDIA GeForce RTX 4090"
    assert before_torch.card_name("cpu", {}) == "cpu"
