"""A model has one name wherever its files lie, and another one as soon as they hold something else."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch

from framepack_core.models import contents
from framepack_core.models.registry import ModelSpec, Source
from tests.conftest import tiny_spec


@pytest.fixture
def moved(tmp_path: Path) -> ModelSpec:
    """Give a copy of a tiny model in another folder, under another name."""
    spec = tiny_spec("framepack-i2v")
    places = {}
    for part in ("transformer", "base", "image_encoder"):
        shutil.copytree(getattr(spec, part).folder, tmp_path / part)
        places[part] = Source(str(tmp_path / part))
    return replace(spec, name="mine", **places)


def test_a_model_keeps_its_name_where_its_folder_moves(moved: ModelSpec) -> None:
    assert contents.digest(moved) == contents.digest(tiny_spec("framepack-i2v"))


def test_a_model_keeps_its_name_where_its_weights_are_split_otherwise(moved: ModelSpec) -> None:
    before = contents.digest(moved)
    folder = moved.transformer.folder
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 1
    tensors = {key: tensor for file in shards for key, tensor in safetensors.torch.load_file(file).items()}
    for file in (*shards, *folder.glob("*.index.json")):
        file.unlink()
    safetensors.torch.save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
    assert contents.digest(moved) == before


@pytest.mark.parametrize("what", ["a weight", "the config", "a tokenizer"])
def test_a_model_that_holds_something_else_has_another_name(moved: ModelSpec, what: str) -> None:
    before = contents.digest(moved)
    if what == "a weight":
        file = min(moved.transformer.folder.glob("*.safetensors"))
        tensors = safetensors.torch.load_file(file)
        tensors[max(tensors)].view(-1)[0] += 1
        safetensors.torch.save_file(tensors, file)
    elif what == "the config":
        file = moved.base.folder / "vae" / "config.json"
        file.write_text(file.read_text().replace("0.476986", "0.5"))
    else:
        file = moved.base.folder / "tokenizer_2" / "merges.txt"
        file.write_text(f"{file.read_text()}a b\n")
    assert contents.digest(moved) != before
