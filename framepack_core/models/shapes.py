"""Derives the shapes of a model's weights from its config.json. No torch here.

Building the libraries' classes would give the same shapes, but needs torch and takes seconds.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

Shape = tuple[int, ...]
Shapes = dict[str, Shape]  # of each weight, by its name in the model

# The config.json of the published transformers, for a file of weights that comes without one.
TRANSFORMER_CONFIG: dict[str, Any] = {
    "_class_name": "HunyuanVideoFramepackTransformer3DModel",
    "attention_head_dim": 128,
    "guidance_embeds": True,
    "has_clean_x_embedder": True,
    "has_image_proj": True,
    "image_proj_dim": 1152,
    "in_channels": 16,
    "mlp_ratio": 4.0,
    "num_attention_heads": 24,
    "num_layers": 20,
    "num_refiner_layers": 2,
    "num_single_layers": 40,
    "out_channels": 16,
    "patch_size": 2,
    "patch_size_t": 1,
    "pooled_projection_dim": 768,
    "qk_norm": "rms_norm",
    "rope_axes_dim": [16, 56, 56],
    "rope_theta": 256.0,
    "text_embed_dim": 4096,
}


def expected(part: str, config: Mapping[str, Any]) -> Shapes:
    """Give the shape of every weight of a part of a model.

    Args:
        part: transformer, text_encoder, text_encoder_2, image_encoder or vae.
        config: the content of its config.json; missing entries have the class's default.

    Raises:
        ValueError, TypeError, KeyError: the config is invalid.
    """
    return _FORMULAS[part](config)


def _linear(name: str, out: int, into: int, *, bias: bool = True) -> Shapes:
    return _affine(name, (out, into), bias=bias)


def _affine(name: str, shape: Shape, *, bias: bool = True) -> Shapes:
    """Give the shapes of a weight and of its bias, which has the weight's first dimension."""
    return {f"{name}.weight": shape} | ({f"{name}.bias": shape[:1]} if bias else {})


def _all(name: str, modules: Iterable[str], out: int, into: int, *, bias: bool = True) -> Shapes:
    found: Shapes = {}
    for module in modules:
        found |= _linear(f"{name}.{module}", out, into, bias=bias)
    return found


def _embedding(name: str, inner: int, into: int) -> Shapes:
    return _linear(f"{name}.linear_1", inner, into) | _linear(f"{name}.linear_2", inner, inner)


def _feed_forward(name: str, inner: int, mlp: int) -> Shapes:
    return _linear(f"{name}.net.0.proj", mlp, inner) | _linear(f"{name}.net.2", inner, mlp)


def _transformer(config: Mapping[str, Any]) -> Shapes:
    """FramePack's; ``Packed`` in the published config is the reference's name for the same class."""
    config = {**TRANSFORMER_CONFIG, "has_clean_x_embedder": False, "has_image_proj": False} | dict(config)
    head = config["attention_head_dim"]
    inner = config["num_attention_heads"] * head
    mlp = int(inner * config["mlp_ratio"])
    latents, patch = config["in_channels"], (config["patch_size_t"], *[config["patch_size"]] * 2)
    text, pooled, timestep = config["text_embed_dim"], config["pooled_projection_dim"], 256
    found = _affine("x_embedder.proj", (inner, latents, *patch))
    if config["has_clean_x_embedder"]:
        for name, factor in (("proj", 1), ("proj_2x", 2), ("proj_4x", 4)):
            kernel = (factor, 2 * factor, 2 * factor)
            found |= _affine(f"clean_x_embedder.{name}", (inner, latents, *kernel))
    if config["has_image_proj"]:
        found |= _linear("image_projection.up", 3 * inner, config["image_proj_dim"])
        found |= _linear("image_projection.down", inner, 3 * inner)
    for name, into in (("timestep_embedder", timestep), ("text_embedder", text)):
        found |= _embedding(f"context_embedder.time_text_embed.{name}", inner, into)
    found |= _linear("context_embedder.proj_in", inner, text)
    for layer in range(config["num_refiner_layers"]):
        block = f"context_embedder.token_refiner.refiner_blocks.{layer}"
        found |= _affine(f"{block}.norm1", (inner,)) | _affine(f"{block}.norm2", (inner,))
        found |= _all(f"{block}.attn", ("to_q", "to_k", "to_v", "to_out.0"), inner, inner)
        found |= _feed_forward(f"{block}.ff", inner, 4 * inner)
        found |= _linear(f"{block}.norm_out.linear", 2 * inner, inner)
    found |= _embedding("time_text_embed.timestep_embedder", inner, timestep)
    found |= _embedding("time_text_embed.text_embedder", inner, pooled)
    if config["guidance_embeds"]:
        found |= _embedding("time_text_embed.guidance_embedder", inner, timestep)
    own = ("to_q", "to_k", "to_v", "to_out.0")
    added = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    for layer in range(config["num_layers"]):
        block = f"transformer_blocks.{layer}"
        found |= _all(f"{block}.attn", own + added, inner, inner)
        for norm in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
            found[f"{block}.attn.{norm}.weight"] = (head,)
        for name in ("norm1", "norm1_context"):
            found |= _linear(f"{block}.{name}.linear", 6 * inner, inner)
        found |= _feed_forward(f"{block}.ff", inner, mlp) | _feed_forward(f"{block}.ff_context", inner, mlp)
    for layer in range(config["num_single_layers"]):
        block = f"single_transformer_blocks.{layer}"
        found |= _all(f"{block}.attn", ("to_q", "to_k", "to_v"), inner, inner)
        found |= {f"{block}.attn.norm_q.weight": (head,), f"{block}.attn.norm_k.weight": (head,)}
        found |= _linear(f"{block}.norm.linear", 3 * inner, inner)
        found |= _linear(f"{block}.proj_mlp", mlp, inner) | _linear(f"{block}.proj_out", inner, inner + mlp)
    found |= _linear("norm_out.linear", 2 * inner, inner)
    return found | _linear("proj_out", math.prod(patch) * config["out_channels"], inner)


def _llama(config: Mapping[str, Any]) -> Shapes:
    """``LlamaModel``, without a head."""
    inner, mlp = config.get("hidden_size", 4096), config.get("intermediate_size", 11008)
    heads = config.get("num_attention_heads", 32)
    head = config.get("head_dim") or inner // heads
    keys = (config.get("num_key_value_heads") or heads) * head
    bias, mlp_bias = config.get("attention_bias", False), config.get("mlp_bias", False)
    found: Shapes = {"embed_tokens.weight": (config.get("vocab_size", 32000), inner)}
    for layer in range(config.get("num_hidden_layers", 32)):
        block = f"layers.{layer}"
        found |= _linear(f"{block}.self_attn.q_proj", heads * head, inner, bias=bias)
        found |= _all(f"{block}.self_attn", ("k_proj", "v_proj"), keys, inner, bias=bias)
        found |= _linear(f"{block}.self_attn.o_proj", inner, heads * head, bias=bias)
        found |= _all(f"{block}.mlp", ("gate_proj", "up_proj"), mlp, inner, bias=mlp_bias)
        found |= _linear(f"{block}.mlp.down_proj", inner, mlp, bias=mlp_bias)
        found |= {
            f"{block}.{norm}.weight": (inner,) for norm in ("input_layernorm", "post_attention_layernorm")
        }
    return found | {"norm.weight": (inner,)}


def _clip_text(config: Mapping[str, Any]) -> Shapes:
    """``CLIPTextModel``."""
    config = config.get("text_config") or config  # as a whole CLIP's says it
    inner = config.get("hidden_size", 512)
    found: Shapes = {
        "embeddings.token_embedding.weight": (config.get("vocab_size", 49408), inner),
        "embeddings.position_embedding.weight": (config.get("max_position_embeddings", 77), inner),
    }
    layers, mlp = config.get("num_hidden_layers", 12), config.get("intermediate_size", 2048)
    return found | _vit_layers(layers, inner, mlp) | _affine("final_layer_norm", (inner,))


def _siglip(config: Mapping[str, Any]) -> Shapes:
    """``SiglipVisionModel`` without its head, which is not used."""
    config = config.get("vision_config") or config
    inner, patch = config.get("hidden_size", 768), config.get("patch_size", 16)
    positions = (config.get("image_size", 224) // patch) ** 2
    found = _affine("embeddings.patch_embedding", (inner, config.get("num_channels", 3), patch, patch))
    found["embeddings.position_embedding.weight"] = (positions, inner)
    layers, mlp = config.get("num_hidden_layers", 12), config.get("intermediate_size", 3072)
    return found | _vit_layers(layers, inner, mlp) | _affine("post_layernorm", (inner,))


def _vit_layers(layers: int, inner: int, mlp: int) -> Shapes:
    found: Shapes = {}
    for layer in range(layers):
        block = f"encoder.layers.{layer}"
        found |= _all(f"{block}.self_attn", ("q_proj", "k_proj", "v_proj", "out_proj"), inner, inner)
        found |= _affine(f"{block}.layer_norm1", (inner,)) | _affine(f"{block}.layer_norm2", (inner,))
        found |= _linear(f"{block}.mlp.fc1", mlp, inner) | _linear(f"{block}.mlp.fc2", inner, mlp)
    return found


def _vae(config: Mapping[str, Any]) -> Shapes:
    """``AutoencoderKLHunyuanVideo``."""
    widths = list(config.get("block_out_channels", (128, 256, 512, 512)))
    latents, layers = config.get("latent_channels", 16), config.get("layers_per_block", 2)
    attention, last = config.get("mid_block_add_attention", True), len(widths) - 1
    in_space = int(math.log2(config.get("spatial_compression_ratio", 8)))
    in_time = int(math.log2(config.get("temporal_compression_ratio", 4)))
    found = _conv("encoder.conv_in", widths[0], config.get("in_channels", 3))
    for i, (before, width) in enumerate(zip([widths[0], *widths], widths, strict=False)):
        block = f"encoder.down_blocks.{i}"
        found |= _resnets(block, layers, before, width)
        if i < in_space or last - in_time <= i < last:
            found |= _conv(f"{block}.downsamplers.0.conv", width, width)
    found |= _mid_block("encoder", widths[-1], attention=attention)
    found |= _affine("encoder.conv_norm_out", (widths[-1],))
    found |= _conv("encoder.conv_out", 2 * latents, widths[-1]) | _conv(
        "decoder.conv_in", widths[-1], latents
    )
    found |= _mid_block("decoder", widths[-1], attention=attention)
    upwards = widths[::-1]
    for i, (before, width) in enumerate(zip([upwards[0], *upwards], upwards, strict=False)):
        block = f"decoder.up_blocks.{i}"
        found |= _resnets(block, layers + 1, before, width)
        if i < in_space or last - in_time <= i < last:
            found |= _conv(f"{block}.upsamplers.0.conv", width, width)
    found |= _affine("decoder.conv_norm_out", (widths[0],))
    found |= _conv("decoder.conv_out", config.get("out_channels", 3), widths[0])
    found |= _affine("quant_conv", (2 * latents, 2 * latents, 1, 1, 1))
    return found | _affine("post_quant_conv", (latents, latents, 1, 1, 1))


def _conv(name: str, out: int, into: int, side: int = 3) -> Shapes:
    return _affine(f"{name}.conv", (out, into, side, side, side))


def _resnets(block: str, layers: int, before: int, width: int) -> Shapes:
    found: Shapes = {}
    for layer in range(layers):
        resnet = f"{block}.resnets.{layer}"
        found |= _affine(f"{resnet}.norm1", (before,)) | _conv(f"{resnet}.conv1", width, before)
        found |= _affine(f"{resnet}.norm2", (width,)) | _conv(f"{resnet}.conv2", width, width)
        if before != width:
            found |= _conv(f"{resnet}.conv_shortcut", width, before, side=1)
        before = width
    return found


def _mid_block(side: str, width: int, *, attention: bool) -> Shapes:
    found = _resnets(f"{side}.mid_block", 2, width, width)
    if attention:
        own = f"{side}.mid_block.attentions.0"
        found |= _affine(f"{own}.group_norm", (width,))
        found |= _all(own, ("to_q", "to_k", "to_v", "to_out.0"), width, width)
    return found


_FORMULAS: dict[str, Callable[[Mapping[str, Any]], Shapes]] = {
    "transformer": _transformer,
    "text_encoder": _llama,
    "text_encoder_2": _clip_text,
    "image_encoder": _siglip,
    "vae": _vae,
}
