"""What check says of a machine, the one at hand or one that is only named."""

import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from framepack_core.networks import compiling
from framepackd.cli.main import main
from framepackd.cluster import roll
from tests.core.models.layouts import one_file, prefixed, weights
from tests.core.networks.taehv import as_published
from tests.golden import TINY_MODELS


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
        (
            "6",
            "32",
            ["1.7 GiB on the GPU while it samples, the rest streamed", "5.6 GiB at the peak, 5.7 free"],
        ),
        ("6", "16", ["block by block, from its files", "slow: every step reads 16 GB from the disk"]),
        ("4", "16", ["too little", "set resolution = 608, or use a card with 5 GiB or more"]),
    ],
)
def test_it_plans_for_a_card_that_is_only_named(config: Path, vram: str, ram: str, words: list[str]) -> None:
    said = check(config, "--vram", vram, "--ram", ram)
    assert said.exception is None or isinstance(said.exception, SystemExit)
    assert "which is not here: by the published sizes" in said.stdout
    for word in words:
        assert word in said.stdout, said.stdout


def test_each_of_several_devices_has_a_line_and_their_memory_is_added_up(config: Path) -> None:
    config.write_text(config.read_text() + 'model = "demo"\n[gpu]\ndevice = ["cpu", "cpu"]\n')
    said = check(config, "--ram", "16")
    assert said.exit_code == 0, said.stdout
    assert [line.split()[1:3] for line in said.stdout.splitlines() if " device " in line] == [
        ["device", "cpu:"],
        ["device", "cpu:"],
    ]
    assert "2 workers: 5.1 GiB of RAM together" in said.stdout
    said = check(config, "--ram", "4")
    assert said.exit_code == 1, "one worker would have enough"
    assert "2 workers together need 5.1 GiB of the host's memory" in said.stdout
    config.write_text(config.read_text().replace('["cpu", "cpu"]', '"cpu"'))
    assert check(config, "--ram", "4").exit_code == 0


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
            for line in check(config, "--vram", "24").stdout.splitlines()
            if "at the peak" in line and "VRAM" in line
        )
        return line.split()[1]

    start = config.read_text()
    assert peak("width = 320\nheight = 320") < peak("resolution = 640") < peak("latent_window_size = 33")
    assert peak("cache = 'teacache'\nlatent_window_size = 16") > peak("latent_window_size = 16")


def test_the_real_machine_is_planned_for_where_none_is_named(config: Path) -> None:
    config.write_text(config.read_text() + 'model = "demo"\n[gpu]\ndevice = "cpu"\n')
    said = check(config).stdout
    assert "memory plan for demo" in said
    assert "┃ part" not in said, "its parts are all 0.0 GiB"
    assert "memory plan" not in check(config, "--no-gpu").stdout


def test_check_says_whether_blocks_are_compiled(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def said(wanted: str) -> str:
        config.write_text(f'{start}model = "demo"\n[gpu]\ndevice = "cpu"\ncompile = {wanted}\n')
        return " ".join(check(config).stdout.split())

    start = config.read_text()
    assert " compile " not in said('"auto"'), "nobody would, on a CPU"
    monkeypatch.setattr(compiling, "missing", lambda *_: None)
    assert "✓ compile all videos" in said("true")
    monkeypatch.setattr(compiling, "missing", lambda *_: "a compiler: install g++")
    assert "✗ compile not compiled, which is slower: needs a compiler: install g++" in said("true")


def of_model(config: Path, transformer: Path) -> str:
    """Give what check says of a model with the tiny parts and another transformer."""
    config.write_text(
        f'state_dir = "{config.parent / "state"}"\nmodel = "mine"\n[models.mine]\nkind = "framepack"\n'
        f'transformer = "{transformer}"\nbase = "{TINY_MODELS}/hunyuanvideo"\n'
        f'image_encoder = "{TINY_MODELS}/flux_redux"\n'
    )
    lines = check(config, "--no-gpu").stdout.splitlines()
    return "\n".join(line for line in lines if "model mine" in line)


def test_what_the_worker_would_refuse_is_said_before_there_is_one(config: Path, tmp_path: Path) -> None:
    """It said "every file is here", and the worker then "damaged or incomplete; download them again"."""
    folder = shutil.copytree(TINY_MODELS / "framepack-i2v", tmp_path / "model")
    assert "✓  model mine" in of_model(config, folder)
    shard = folder / "diffusion_pytorch_model-00002-of-00003.safetensors"
    save_file({f"blocks.{name}": tensor for name, tensor in load_file(shard).items()}, shard)
    assert "missing weights of 148" in of_model(config, folder)
    shard.write_text("version https://git-lfs.github.com/spec/v1")
    assert f"{shard} is a Git LFS pointer" in of_model(config, folder)


def test_a_file_of_a_transformer_is_taken_and_a_key_too_many_said(config: Path, tmp_path: Path) -> None:
    file = one_file(tmp_path, {**prefixed(weights()), "model_sampling.sigmas": torch.zeros(3)})
    said = of_model(config, file)
    assert "✓  model mine" in said
    assert f"{file} has 1 key that is no weight of the model (model_sampling.sigmas)" in said
    assert "config.json" not in said
    gone = of_model(config, tmp_path / "gone.safetensors")
    assert f"{tmp_path}/gone.safetensors is missing: put it there" in gone


@pytest.mark.parametrize("arguments", [(), ("--no-gpu",)])
def test_the_decoder_of_previews_is_looked_at(
    config: Path, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    config.write_text(config.read_text() + 'preview_decoder = "taehv.safetensors"\n[gpu]\ndevice = "cpu"\n')
    file = tmp_path / "taehv.safetensors"

    def told() -> str:
        (line,) = (
            line for line in check(config, *arguments).stdout.splitlines() if "preview_decoder" in line
        )
        return line

    assert f"{file} cannot be read (No such file or directory): use taehv.safetensors" in told()
    save_file(as_published(decoder__1__weight=torch.zeros(256, 32, 3, 3)), file)
    assert f"{file} is not the tiny decoder for HunyuanVideo (decoder.1.weight has the shape" in told()
    save_file(as_published(), file)
    assert told().split() == ["✓", "preview_decoder", str(file)]


def test_without_torch_a_pickle_is_seen_to_be_an_archive_with_it_to_hold_the_weights(
    config: Path, tmp_path: Path
) -> None:
    config.write_text(config.read_text() + 'preview_decoder = "taehv.pth"\n[gpu]\ndevice = "cpu"\n')
    torch.save({}, tmp_path / "taehv.pth")
    assert "is not the tiny decoder" not in check(config, "--no-gpu").stdout
    assert "it has no decoder.1.weight" in check(config).stdout


def test_it_asks_which_other_machines_there_are(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config.write_text(
        f'{config.read_text()}model = "demo"\n[gpu]\ndevice = []\n[cluster]\nnodes = ["render2"]\n'
    )
    said = check(config)
    assert (said.exit_code, "framepackd node does not run on this machine" in said.stdout) == (1, True)
    assert "no device of this machine computes" in said.stdout
    told = [roll.Node("render2", "10.0.0.7", True, ("cuda:0",)), roll.Node("render3", "", False, ())]
    monkeypatch.setattr(roll, "ask", lambda _: told)
    said = check(config)
    assert said.exit_code == 0, said.stdout
    assert "render2: cuda:0; no answer from render3" in said.stdout
    monkeypatch.setattr(roll, "ask", lambda _: told[1:])
    said = check(config)
    assert (said.exit_code, "no answer from render2, render3" in said.stdout) == (1, True)
