"""The whole model at the published shape with random weights: in memory, on the device, or in files.

``FRAMEPACKD_BENCHMARK=tiny`` makes all of it small. Tokenizers are the demo model's. ``python -m benchmarks
full_shape`` compares its size with the one that plans assume where no model is installed.
"""

import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights  # type: ignore[import-untyped]  # it has no types
from diffusers import AutoencoderKLHunyuanVideo, HunyuanVideoFramepackTransformer3DModel
from torch import nn
from transformers import CLIPTextModel, LlamaModel, SiglipVisionModel

from benchmarks import Row
from framepack_core.memory import footprint
from framepack_core.models.registry import BUILT_IN, ModelSpec, Source
from framepack_core.networks import loading

SMALL = os.environ.get("FRAMEPACKD_BENCHMARK") == "tiny"
DEMO = BUILT_IN["demo"]
BASE, IMAGE_ENCODER = DEMO.base.folder, DEMO.image_encoder.folder
CLASSES: dict[str, Any] = {
    "transformer": HunyuanVideoFramepackTransformer3DModel,
    "text_encoder": LlamaModel,
    "text_encoder_2": CLIPTextModel,
    "vae": AutoencoderKLHunyuanVideo,
    "image_encoder": SiglipVisionModel,
}
IN_TRANSFORMERS = ("text_encoder", "text_encoder_2", "image_encoder")
# The published dtypes, by part.
STORED = dict.fromkeys(CLASSES, torch.float16) | {"transformer": torch.bfloat16, "vae": torch.float32}
TRANSFORMER: dict[str, Any] = {"has_image_proj": True, "image_proj_dim": 1152, "has_clean_x_embedder": True}
SMALL_TRANSFORMER = TRANSFORMER | {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 2,
    "num_single_layers": 3,
    "text_embed_dim": 32,
    "pooled_projection_dim": 32,
    "rope_axes_dim": (4, 6, 6),
    "image_proj_dim": 32,
}
# Where the published configurations differ from the demo model's.
FULL: dict[str, dict[str, Any]] = {
    "text_encoder": {
        "vocab_size": 128320,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 8192,
        "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"},
    },
    "text_encoder_2": {
        "vocab_size": 49408,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
    },
    "image_encoder": {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 384,
        "patch_size": 14,
    },
}
SMALLER = {"text_encoder": {"hidden_size": 32, "num_hidden_layers": 4}}
POOL = 1 << 22  # random numbers, repeated: drawing 21 billion would take minutes
SHARD = 5 << 30  # bytes of a file, as the hub's


def rows() -> Iterator[Row]:
    """Count what the files hold."""
    for part in CLASSES:
        count = sum(math.prod(shape) for shape in layout(part).values()) / 1e9
        planned = [footprint.PUBLISHED.core, footprint.PUBLISHED.embedders]
        if part != "transformer":
            planned = [getattr(footprint.PUBLISHED, part)]
        published = sum(component.parameters for component in planned) / 1e9
        yield Row(f"parameters of the {part}", count, published, "G", "the full shape is the published one")


def folder_of(part: str) -> Path:
    """Give the folder that the demo model has a part in."""
    inside = {"transformer": DEMO.transformer.folder, "image_encoder": IMAGE_ENCODER / "image_encoder"}
    return inside.get(part, BASE / part)


def config(part: str) -> dict[str, Any]:
    """Give the configuration of a part, as its file has it."""
    if part == "transformer":
        return SMALL_TRANSFORMER if SMALL else TRANSFORMER
    if part == "vae":
        return (
            {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4, "layers_per_block": 1} if SMALL else {}
        )
    told: dict[str, Any] = json.loads((folder_of(part) / "config.json").read_text())
    return told | (SMALLER if SMALL else FULL).get(part, {})


def empty(part: str, **changed: Any) -> Any:
    """Give a part without weights: parameters on the meta device, buffers as they are to be."""
    component, settings = CLASSES[part], config(part) | changed
    with init_empty_weights():
        if part in IN_TRANSFORMERS:
            return component(component.config_class.from_dict(settings))
        return component(**settings)


Make = Callable[[str, torch.Size, torch.dtype], torch.Tensor]


def with_weights(part: str, dtype: torch.dtype, device: torch.device, make: Make) -> Any:
    """Give a part with weights from ``make``, which is given each one's name, shape and dtype."""
    module = empty(part, **({"vision_use_head": False} if part == "image_encoder" else {}))
    for prefix, owner in module.named_modules():
        for name, parameter in list(owner.named_parameters(prefix, recurse=False)):
            made = make(name, parameter.shape, dtype)
            setattr(owner, name.rpartition(".")[2], nn.Parameter(made, requires_grad=False))
        for name, buffer in list(owner.named_buffers(recurse=False)):
            owner._buffers[name] = buffer.to(device)
    return module.eval()


def is_norm(name: str, shape: torch.Size) -> bool:
    """Say whether a weight scales its input: random scales would make the numbers vanish."""
    return "norm" in name and name.endswith("weight") and len(shape) == 1


def on_device(device: torch.device) -> Make:
    """Make weights where they are used, each one's own."""
    pool = torch.randn(POOL, device=device).mul_(0.02)

    def make(name: str, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        if is_norm(name, shape):
            return torch.ones(shape, dtype=dtype, device=device)
        made = torch.empty(shape, dtype=dtype, device=device)
        flat = made.view(-1)
        for start in range(0, flat.numel(), POOL):
            piece = flat[start : start + POOL]
            piece.copy_(pool[: piece.numel()])
        return made

    return make


def shared() -> Make:
    """Make weights that all share the same numbers in host memory, and so take nearly none."""
    pools: dict[torch.dtype, torch.Tensor] = {}

    def make(name: str, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        if is_norm(name, shape):
            return torch.ones(shape, dtype=dtype)
        pool = pools.get(dtype, torch.empty(0))
        if pool.numel() < shape.numel():
            drawn = torch.randn(POOL).mul_(0.02).to(dtype)
            pool = pools[dtype] = drawn.repeat(-(-shape.numel() // POOL))
        return pool[: shape.numel()].view(shape)

    return make


def models(spec: ModelSpec, dtypes: tuple[torch.dtype, torch.dtype], make: Make, device: torch.device) -> Any:
    """Give all components, as :func:`framepack_core.networks.loading.load` does; ``dtypes`` likewise."""
    transformer_dtype, others = dtypes
    demo = loading.load(DEMO, dtype=torch.float32, encoder_dtype=torch.float32)
    dtype_of = dict.fromkeys(CLASSES, others) | {"transformer": transformer_dtype}
    made = {part: with_weights(part, dtype_of[part], device, make) for part in CLASSES}
    loading.keep_output_in_float32(made["transformer"])
    side = config("image_encoder")["image_size"]
    processor: Any = demo.image_processor
    processor.size = {"height": side, "width": side}
    return replace(demo, spec=spec, dtype=transformer_dtype, **made)


@cache
def layout(part: str) -> dict[str, tuple[int, ...]]:
    """Name the tensors of a part and their shapes, as its files have them."""
    return {name: tuple(tensor.shape) for name, tensor in empty(part).state_dict().items()}


def size() -> int:
    """Add up the bytes of all files of weights."""
    return sum(
        math.prod(shape) * STORED[part].itemsize for part in CLASSES for shape in layout(part).values()
    )


def write(folder: Path, *, filled: bool) -> ModelSpec:
    """Write the model in the hub's layout; unfilled files are holes, which read as zeros and take no disk.

    What is there already is left: a folder is finished when the file ``written`` is in it.
    """
    places = {part: folder / "base" / part for part in CLASSES}
    places |= {part: folder / part / part for part in ("image_encoder",)}
    places["transformer"] = folder / "transformer"
    if not (folder / "written").exists():
        for part, place in places.items():
            place.mkdir(parents=True, exist_ok=True)
            told = config(part) | ({} if part in IN_TRANSFORMERS else {"_class_name": CLASSES[part].__name__})
            (place / "config.json").write_text(json.dumps(told))
            _write_shards(part, place, filled=filled)
        for name in ("tokenizer", "tokenizer_2"):
            _copy(BASE / name, folder / "base" / name)
        _copy(IMAGE_ENCODER / "feature_extractor", folder / "image_encoder" / "feature_extractor")
        (folder / "written").touch()
    return ModelSpec(
        "full shape",
        "framepack",
        Source(str(folder / "transformer")),
        Source(str(folder / "base")),
        Source(str(folder / "image_encoder")),
    )


def _copy(source: Path, target: Path) -> None:
    target.mkdir(exist_ok=True)
    for file in source.iterdir():
        content = file.read_bytes()
        if file.name == "preprocessor_config.json":
            side = config("image_encoder")["image_size"]
            content = json.dumps(json.loads(content) | {"size": {"height": side, "width": side}}).encode()
        (target / file.name).write_bytes(content)


def _shards(part: str) -> Iterator[dict[str, tuple[int, ...]]]:
    """Give the tensors file by file."""
    held: dict[str, tuple[int, ...]] = {}
    taken = 0
    for name, shape in layout(part).items():
        nbytes = math.prod(shape) * STORED[part].itemsize
        if held and taken + nbytes > SHARD:
            yield held
            held, taken = {}, 0
        held[name] = shape
        taken += nbytes
    yield held


def _write_shards(part: str, place: Path, *, filled: bool) -> None:
    stem = "model" if part in IN_TRANSFORMERS else "diffusion_pytorch_model"
    shards = list(_shards(part))
    places: dict[str, str] = {}
    for number, tensors in enumerate(shards, 1):
        name = (
            f"{stem}-{number:05}-of-{len(shards):05}.safetensors"
            if len(shards) > 1
            else f"{stem}.safetensors"
        )
        _write_tensors(place / name, tensors, STORED[part], filled=filled)
        places |= dict.fromkeys(tensors, name)
    if len(shards) > 1:
        index = {"metadata": {}, "weight_map": places}
        (place / f"{stem}.safetensors.index.json").write_text(json.dumps(index))


NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}  # as safetensors has them


def _write_tensors(
    file: Path, tensors: dict[str, tuple[int, ...]], dtype: torch.dtype, *, filled: bool
) -> None:
    """Write a safetensors file: the length of its header, the header, the numbers."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in tensors.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": shape, "data_offsets": (begin, end)}
    written = json.dumps(header).encode()
    written += b" " * (-len(written) % 8)
    pool = memoryview(torch.randn(POOL).mul_(0.02).to(dtype).view(torch.uint8).numpy().tobytes())
    with file.open("wb") as stream:
        stream.write(len(written).to_bytes(8, "little") + written)
        if not filled:
            stream.truncate(stream.tell() + end)
            return
        while end:
            end -= stream.write(pool[: min(end, len(pool))])
