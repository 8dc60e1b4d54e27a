"""LoRAs for the tiny models, written as each family of trainers writes them."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from framepack_core.engine import Engine, Step
from framepack_core.models.registry import ModelSpec, find
from framepack_core.networks.fp8 import Fp8Linear
from framepack_core.request import Lora, Request

RANK = 2
Weights = Mapping[str, torch.Tensor]
# HunyuanVideo's modules, as they are called there, and the weights that are theirs, one below the other.
DOUBLE = {
    "img_attn.qkv": ["attn.to_q", "attn.to_k", "attn.to_v"],
    "img_attn.proj": ["attn.to_out.0"],
    "img_mlp.fc1": ["ff.net.0.proj"],
    "img_mlp.fc2": ["ff.net.2"],
    "img_mod.linear": ["norm1.linear"],
    "txt_attn.qkv": ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"],
    "txt_attn.proj": ["attn.to_add_out"],
    "txt_mlp.fc1": ["ff_context.net.0.proj"],
    "txt_mlp.fc2": ["ff_context.net.2"],
    "txt_mod.linear": ["norm1_context.linear"],
}
SINGLE = {
    "linear1": ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"],
    "linear2": ["proj_out"],
    "modulation.linear": ["norm.linear"],
}
REFINER = {
    "self_attn.qkv": ["attn.to_q", "attn.to_k", "attn.to_v"],
    "self_attn.proj": ["attn.to_out.0"],
    "mlp.fc1": ["ff.net.0.proj"],
    "mlp.fc2": ["ff.net.2"],
    "adaLN_modulation.1": ["norm_out.linear"],
}
ONCE = {
    "txt_in.input_embedder": ["context_embedder.proj_in"],
    "time_in.mlp.0": ["time_text_embed.timestep_embedder.linear_1"],
    "txt_in.t_embedder.mlp.2": ["context_embedder.time_text_embed.timestep_embedder.linear_2"],
    "txt_in.c_embedder.linear_1": ["context_embedder.time_text_embed.text_embedder.linear_1"],
    "vector_in.out_layer": ["time_text_embed.text_embedder.linear_2"],
    "guidance_in.mlp.2": ["time_text_embed.guidance_embedder.linear_2"],
    "final_layer.linear": ["proj_out"],
}
PLACES = (
    (r"transformer_blocks\.(\d+)\.", "double_blocks", DOUBLE),
    (r"single_transformer_blocks\.(\d+)\.", "single_blocks", SINGLE),
    (
        r"context_embedder\.token_refiner\.refiner_blocks\.(\d+)\.",
        "txt_in.individual_token_refiner.blocks",
        REFINER,
    ),
)


def hunyuan_modules(weights: Mapping[str, tuple[int, ...]]) -> dict[str, list[str]]:
    """Give HunyuanVideo's modules of a transformer of any depth, each with its weights in diffusers."""
    modules = {name: [f"{weight}.weight" for weight in parts] for name, parts in ONCE.items()}
    for pattern, theirs, names in PLACES:
        blocks = {(found[0], found[1]) for name in weights if (found := re.match(pattern, name))}
        for ours, number in sorted(blocks):
            for name, parts in names.items():
                modules[f"{theirs}.{number}.{name}"] = [f"{ours}{part}.weight" for part in parts]
    return modules


def linear_weights(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, list[str]]:
    """Give the layers that a trainer with diffusers' names trains: all linear ones."""
    return {
        name.removesuffix(".weight"): [name]
        for name, shape in shapes.items()
        if name.endswith(".weight") and len(shape) == 2
    }


def _as_in_comfyui(name: str) -> str:
    for theirs, comfyui in (
        (r"(time_in|guidance_in|t_embedder)\.mlp\.0", r"\1.in_layer"),
        (r"(time_in|guidance_in|t_embedder)\.mlp\.2", r"\1.out_layer"),
        (r"c_embedder\.linear_1", "c_embedder.in_layer"),
        (r"mlp\.fc1", "mlp.0"),
        (r"mlp\.fc2", "mlp.2"),
        (r"(_mod|modulation)\.linear", r"\1.lin"),
    ):
        name = re.sub(theirs, comfyui, name)
    return name


# Family -> what a key is made of the module's name; the names of the two matrices.
FAMILIES: dict[str, tuple[bool, Callable[[str], str], tuple[str, str]]] = {
    "kohya-hunyuan": (True, lambda name: "lora_unet_" + name.replace(".", "_"), ("lora_down", "lora_up")),
    "kohya-framepack": (False, lambda name: "lora_unet_" + name.replace(".", "_"), ("lora_down", "lora_up")),
    "diffusion-pipe": (True, lambda name: "diffusion_model." + name, ("lora_A", "lora_B")),
    "comfyui": (
        True,
        lambda name: "diffusion_model." + _as_in_comfyui(name),
        ("lora_A", "lora_B"),
    ),
    "original-transformer": (
        True,
        lambda name: "transformer." + name.replace("_attn.", "_attn_"),
        ("lora_A", "lora_B"),
    ),
    "diffusers": (False, lambda name: "transformer." + name, ("lora_A", "lora_B")),
    # musubi-tuner's converter turns kohya's names back into dotted ones without knowing where dots belong.
    "converted": (
        False,
        lambda name: "diffusion_model." + name.replace("_", "."),
        ("lora_A", "lora_B"),
    ),
    "lycoris": (False, lambda name: "lycoris_" + name.replace(".", "_"), ("lora_down", "lora_up")),
}


def stored(spec: ModelSpec) -> dict[str, torch.Tensor]:
    tensors = {}
    for file in find(spec).transformer.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a dict
    return tensors


def make_lora(
    file: Path,
    family: str,
    base: Weights,
    *,
    seed: int = 1,
    only: str = "",
    alpha: float | torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    extra: Weights | None = None,
    metadata: dict[str, str] | None = None,
) -> dict[str, torch.Tensor]:
    """Write a LoRA of every layer (with ``only`` in its name); give what it adds to each weight."""
    hunyuan, named, (down_name, up_name) = FAMILIES[family]
    shapes = {name: tuple(tensor.shape) for name, tensor in base.items()}
    modules = hunyuan_modules(shapes) if hunyuan else linear_weights(shapes)
    generator = torch.Generator().manual_seed(seed)
    tensors, added = dict[str, torch.Tensor](), dict[str, torch.Tensor]()
    for module, weights in modules.items():
        if only not in module:
            continue
        down = torch.randn(RANK, shapes[weights[0]][1], generator=generator) * 0.1
        up = torch.randn(sum(shapes[name][0] for name in weights), RANK, generator=generator) * 0.1
        down, up = down.to(dtype), up.to(dtype)
        tensors |= {f"{named(module)}.{down_name}.weight": down, f"{named(module)}.{up_name}.weight": up}
        if alpha is not None:
            tensors[f"{named(module)}.alpha"] = torch.as_tensor(alpha).clone()
        scale = 1.0 if alpha is None else float(alpha) / RANK
        for name, rows in zip(weights, up.split([shapes[name][0] for name in weights]), strict=True):
            added[name] = scale * (rows.float() @ down.float())
    tensors |= extra or {}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata)
    return added


def by_hand(base: Weights, *added: tuple[float, Weights]) -> dict[str, torch.Tensor]:
    """Add the deltas of LoRAs, each with its weight, to a model's own weights."""
    merged = {name: tensor.float().clone() for name, tensor in base.items()}
    for weight, deltas in added:
        for name, delta in deltas.items():
            merged[name] += weight * delta
    return {name: tensor.to(base[name].dtype) for name, tensor in merged.items()}


def weights_of(engine: Engine) -> dict[str, torch.Tensor]:
    """Copy all current weights of the transformer, by their names in the files."""
    weights = dict[str, torch.Tensor]()
    for name, layer in engine.merger.layers.items():
        weights[f"{name}.weight"] = layer.weight.data.clone()
        if isinstance(layer, Fp8Linear):
            weights[f"{name}.scale"] = layer.scale.data.clone()
        if (quantized := getattr(layer.weight, "quant_state", None)) is not None:
            weights[f"{name}.scales"] = quantized.absmax.clone()
            weights[f"{name}.scales of scales"] = quantized.state2.absmax.clone()
    return weights


def differing(left: Weights, right: Weights) -> list[str]:
    """Name the weights whose bits differ."""
    assert left.keys() == right.keys()
    return [
        name
        for name, tensor in left.items()
        if tensor.dtype != right[name].dtype
        or not torch.equal(tensor.contiguous().view(torch.uint8), right[name].contiguous().view(torch.uint8))
    ]


def latents(engine: Engine, request: Request) -> torch.Tensor:
    """Give the prediction of the first step."""
    for event in engine.generate(request):
        if isinstance(event, Step):
            return event.denoised.clone()
    raise AssertionError("there are steps")


def merge(engine: Engine, *loras: Lora) -> None:
    """Merge these LoRAs and no others."""
    engine.merger.merge(loras, engine.places)
