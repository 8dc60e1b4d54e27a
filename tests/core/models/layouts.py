"""Writes the tiny models in the layouts that people have: other names, shards, prefixes and numbers."""

import json
import shutil
import struct
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from framepack_core.models import shapes
from framepack_core.models.headers import FLOAT_BYTES
from framepack_core.models.registry import ModelSpec, Source
from framepack_core.networks import loading
from tests.conftest import tiny_spec
from tests.golden import TINY_MODELS

FP8 = torch.float8_e4m3fn
PUBLISHED = TINY_MODELS / "framepack-i2v"
FILE = "FramePackI2V_HY_bf16.safetensors"
PREFIX = "model.diffusion_model."
COMMIT = "0123456789abcdef0123456789abcdef01234567"

Weights = dict[str, torch.Tensor]


def weights() -> Weights:
    """Read the transformer's weights from all of its shards."""
    found: Weights = {}
    for shard in sorted(PUBLISHED.glob("*.safetensors")):
        found |= load_file(shard)
    return found


def spec_of(transformer: Path) -> ModelSpec:
    """Specify a tiny model whose transformer is elsewhere."""
    return replace(tiny_spec(), transformer=Source(str(transformer)))


def load(transformer: Path, dtype: torch.dtype = torch.float32) -> Weights:
    """Load a tiny model with that transformer, and give its loaded weights."""
    loaded = loading.load(spec_of(transformer), dtype=dtype, encoder_dtype=torch.float32)
    return dict(loaded.transformer.state_dict())


def one_file(folder: Path, tensors: Mapping[str, torch.Tensor], name: str = FILE) -> Path:
    """Write weights as one file, next to the config of the tiny model."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(PUBLISHED / "config.json", folder)
    save_file(dict(tensors), folder / name)
    return folder / name


def prefixed(tensors: Mapping[str, torch.Tensor]) -> Weights:
    """Add the prefix of ComfyUI's checkpoints to each name."""
    return {f"{PREFIX}{name}": tensor for name, tensor in tensors.items()}


def is_layer(name: str, tensor: torch.Tensor) -> bool:
    """Return whether programs store this weight in 8 bits: it is a matrix of a block."""
    return "blocks." in name and name.endswith(".weight") and tensor.dim() == 2


def fp8(tensors: Mapping[str, torch.Tensor]) -> Weights:
    """Store the blocks' matrices as fp8, the rest as bfloat16."""
    return {
        name: tensor.to(FP8 if is_layer(name, tensor) else torch.bfloat16) for name, tensor in tensors.items()
    }


def scaled_fp8(tensors: Mapping[str, torch.Tensor], *, by_row: bool = False) -> Weights:
    """Store the blocks' matrices as fp8 numbers that use its whole range, with their scales."""
    found: Weights = {"scaled_fp8": torch.zeros(2, dtype=FP8)}
    for name, tensor in tensors.items():
        if not is_layer(name, tensor):
            found[name] = tensor.to(torch.bfloat16)
            continue
        largest = tensor.abs().amax(dim=1, keepdim=True) if by_row else tensor.abs().amax()
        scale = largest / 448
        module = name.removesuffix(".weight")
        found[name] = (tensor / scale).to(FP8)
        found[f"{module}.weight_scale" if by_row else f"{module}.scale_weight"] = scale
        found[f"{module}.scale_input"] = torch.ones(1)
    return found


def shards(folder: Path) -> Path:
    """Split weights in three, as numbered files without an index."""
    shutil.copytree(PUBLISHED, folder)
    (folder / "diffusion_pytorch_model.safetensors.index.json").unlink()
    return folder


def variant(folder: Path) -> Path:
    """Name the only file as a variant."""
    return one_file(folder, weights(), "diffusion_pytorch_model.fp16.safetensors").parent


def variant_shards(folder: Path) -> Path:
    """Name shards and their index as a variant."""
    shutil.copytree(PUBLISHED, folder)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    told = json.loads(index.read_text())
    for file in sorted(folder.glob("*.safetensors")):
        file.rename(file.with_name(file.name.replace("model-", "model.fp16-")))
    told["weight_map"] = {
        key: file.replace("model-", "model.fp16-") for key, file in told["weight_map"].items()
    }
    index.unlink()
    (folder / "diffusion_pytorch_model.safetensors.index.fp16.json").write_text(json.dumps(told))
    return folder


def beside_others(folder: Path) -> Path:
    """Add a smaller variant, macOS's hidden files and a hidden index to the usual files."""
    shutil.copytree(PUBLISHED, folder)
    save_file({"x": torch.zeros(1)}, folder / "diffusion_pytorch_model.fp16.safetensors")
    for name in ("._diffusion_pytorch_model-00001-of-00003.safetensors", "._x.safetensors.index.json"):
        (folder / name).write_bytes(b"\0\5\26\7")
    return folder


def left_behind_index(folder: Path) -> Path:
    """Add the index of missing shards to a single file of weights."""
    file = one_file(folder, weights(), "diffusion_pytorch_model.safetensors")
    shutil.copy(PUBLISHED / "diffusion_pytorch_model.safetensors.index.json", folder)
    return file.parent


def hub_folder(folder: Path) -> Path:
    """Arrange files as the hub's client does, with another revision; gives the repository's folder."""
    above = folder / "models--lllyasviel--FramePackI2V_HY"
    shutil.copytree(PUBLISHED, above / "snapshots" / COMMIT)
    (above / "snapshots" / ("f" * 40)).mkdir()
    (above / "refs").mkdir()
    (above / "refs/main").write_text(COMMIT)
    return above


LAYOUTS: dict[str, Callable[[Path], Path]] = {
    "one file": lambda folder: one_file(folder, weights()),
    "a file without an ending": lambda folder: one_file(folder, weights(), "framepack"),
    "one file under another name in a folder": lambda folder: one_file(folder, weights()).parent,
    "with a prefix": lambda folder: one_file(folder, prefixed(weights())),
    "shards without an index": shards,
    "a file that is one of shards": lambda folder: next(shards(folder).glob("*-00002-of-*")),
    "a variant": variant,
    "a variant in shards": variant_shards,
    "other files beside it": beside_others,
    "an index that is left behind": left_behind_index,
    "the hub's folder": hub_folder,
    "a key too many": lambda folder: one_file(folder, weights() | {"pos_embed_cache": torch.zeros(3)}),
}


def full_size(file: Path, dtype: str = "F8_E4M3", **others: tuple[str, tuple[int, ...]]) -> Path:
    """Write a sparse file with the published transformer's header and length.

    Args:
        file: where to.
        dtype: of the blocks' matrices; the rest is BF16.
        others: kind of numbers and shape of keys beside, or instead.
    """
    wanted = {
        name: (dtype if "blocks." in name and len(shape) == 2 else "BF16", shape)
        for name, shape in shapes.expected("transformer", shapes.TRANSFORMER_CONFIG).items()
    }
    header, end = {}, 0
    for name, (kind, shape) in (wanted | others).items():
        begin, end = end, end + FLOAT_BYTES[kind] * torch.Size(shape).numel()
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}
    told = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(told)) + told)
        stream.truncate(8 + len(told) + end)
    return file
