"""What check says of a machine, the one at hand or one that is only named."""

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from framepackd.cli import main


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    path = tmp_path / "config.toml"
    path.write_text(f'state_dir = "{tmp_path / "state"}"\n')
    return path


def check(config: Path, *arguments: str) -> Result:
    return CliRunner().invoke(main, ["check", "--config", str(config), *arguments])


@pytest.mark.parametrize(
    ("vram", "ram", "words"),
    [
        (
            "24",
            "32",
            ["transformer, sampling loop     │ 16.9 │ on the GPU", "full: nothing moves while it samples"],
        ),
        ("6", "32", ["block by block, from page-locked RAM", "4.4 GiB at the peak, 5.7 free"]),
        ("6", "16", ["block by block, from its files", "slow: every step reads 18 GB from the disk"]),
        ("4", "16", ["too little", "set resolution = 512, or use a card with 5 GiB or more"]),
    ],
)
def test_it_plans_for_a_card_that_is_only_named(config: Path, vram: str, ram: str, words: list[str]) -> None:
    said = check(config, "--vram", vram, "--ram", ram)
    assert said.exception is None or isinstance(said.exception, SystemExit)
    assert "which is not here: by the published sizes" in said.stdout
    for word in words:
        assert word in said.stdout, said.stdout


def test_a_plan_that_cannot_work_is_a_problem(config: Path) -> None:
    config.write_text(config.read_text() + 'model = "demo"\n')
    assert check(config, "--vram", "6", "--ram", "16").exit_code == 0
    config.write_text(config.read_text() + "[defaults]\nresolution = 2048\n")
    said = check(config, "--vram", "6", "--ram", "16")
    assert said.exit_code == 1
    assert "set resolution = " in said.stdout


def test_what_the_defaults_ask_for_is_planned_for(config: Path) -> None:
    def peak(settings: str) -> str:
        config.write_text(f"{start}[defaults]\n{settings}\n")
        (line,) = (
            line
            for line in check(config, "--vram", "12").stdout.splitlines()
            if "at the peak" in line and "VRAM" in line
        )
        return line.split()[1]

    start = config.read_text()
    assert peak("width = 320\nheight = 320") < peak("resolution = 640") < peak("latent_window_size = 33")
    assert peak("cache = 'teacache'") > peak("cache = 'none'")


def test_the_real_machine_is_planned_for_where_none_is_named(config: Path) -> None:
    config.write_text(config.read_text() + 'model = "demo"\n[gpu]\ndevice = "cpu"\n')
    assert "in RAM" in check(config).stdout
    assert "memory plan" not in check(config, "--no-gpu").stdout
