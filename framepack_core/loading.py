"""Load a model's components with the dtypes the reference uses, and trust none of them silently."""

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLHunyuanVideo, HunyuanVideoFramepackTransformer3DModel, ModelMixin
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    CLIPTextModel,
    CLIPTokenizer,
    LlamaModel,
    PreTrainedTokenizerFast,
    SiglipImageProcessorPil,
    SiglipVisionModel,
)

from framepack_core import models
from framepack_core.conditioning import verify_prompt_template
from framepack_core.errors import ModelError
from framepack_core.models import ModelSpec

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Models:
    """The loaded components of one model, on the CPU."""

    spec: ModelSpec
    transformer: HunyuanVideoFramepackTransformer3DModel
    text_encoder: LlamaModel
    text_encoder_2: CLIPTextModel
    tokenizer: PreTrainedTokenizerFast
    tokenizer_2: CLIPTokenizer
    vae: AutoencoderKLHunyuanVideo
    image_encoder: SiglipVisionModel
    image_processor: SiglipImageProcessorPil
    dtype: torch.dtype  # of the transformer's blocks, and of what goes into it


def load(spec: ModelSpec, *, dtype: torch.dtype, encoder_dtype: torch.dtype) -> Models:
    """Load every component of a model from this machine.

    Args:
        spec: which model; its files are looked for locally and in the hub's cache.
        dtype: of the transformer, whose last layer is float32 whatever this is; the reference: bfloat16.
        encoder_dtype: of text encoders, image encoder and VAE; the reference: float16.

    Raises:
        ModelError: a file is missing, or is not what it should be.
    """
    folders = models.find(spec)
    base = folders.base
    # Not LlamaTokenizerFast: since transformers 5 it loses the spaces of every prompt.
    tokenizer = _read(PreTrainedTokenizerFast, base / "tokenizer")
    verify_prompt_template(tokenizer)
    return Models(
        spec=spec,
        transformer=_load_transformer(folders.transformer, dtype),
        text_encoder=_load(LlamaModel, base / "text_encoder", encoder_dtype),
        text_encoder_2=_load(CLIPTextModel, base / "text_encoder_2", encoder_dtype),
        tokenizer=tokenizer,
        tokenizer_2=_read(CLIPTokenizer, base / "tokenizer_2"),
        vae=_load(AutoencoderKLHunyuanVideo, base / "vae", encoder_dtype),
        # Without what pools the picture's tokens into one, which is not used: in it a layer's weights are
        # taken without calling it, so that no hook could fetch them.
        image_encoder=_load(
            SiglipVisionModel,
            folders.image_encoder / "image_encoder",
            encoder_dtype,
            unused=re.compile(r"(vision_model\.)?head\."),
            vision_use_head=False,
        ),
        # The PIL one by name: with torchvision installed the plain class computes other pixels.
        image_processor=_read(SiglipImageProcessorPil, folders.image_encoder / "feature_extractor"),
        dtype=dtype,
    )


def _load_transformer(folder: Path, dtype: torch.dtype) -> HunyuanVideoFramepackTransformer3DModel:
    transformer = _load(HunyuanVideoFramepackTransformer3DModel, folder, dtype)
    if transformer.clean_x_embedder is None or transformer.image_projection is None:
        raise ModelError(
            f"{folder} holds a HunyuanVideo transformer that is not FramePack's: use a FramePack one"
        )
    keep_output_in_float32(transformer)
    return transformer


def keep_output_in_float32(transformer: Any) -> None:
    """Compute the last layer in float32, so that the velocity is not rounded to the blocks' dtype."""
    transformer.proj_out.to(torch.float32)
    transformer.proj_out.register_forward_pre_hook(_inputs_to_float32)


def _inputs_to_float32(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(tensor.float() for tensor in inputs)


def _read(component: Any, folder: Path, **arguments: Any) -> Any:
    """Have a library read a folder, and say which it was if that fails."""
    try:
        return component.from_pretrained(folder, local_files_only=True, **arguments)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        raise ModelError(
            f"{folder} cannot be loaded ({type(error).__name__}: {error}): "
            "its files are damaged or incomplete; download them again"
        ) from error


def _stored_keys(folder: Path) -> set[str]:
    keys: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            keys.update(tensors.keys())
    return keys


def _load(
    component: Any,
    folder: Path,
    dtype: torch.dtype,
    *,
    unused: re.Pattern[str] | None = None,
    **arguments: Any,
) -> Any:
    """Load one component and refuse it if any weight is missing, left over or of another shape.

    Weights that are stored in ``dtype`` are read in place, from pages that the kernel can drop; others are
    converted one by one. ``unused`` matches the names of those that may be left over.
    """
    module, report = _read(
        component, folder, dtype=dtype, use_safetensors=True, output_loading_info=True, **arguments
    )
    faults = {
        name: set(map(str, report.get(f"{name}_keys") or ()))
        for name in ("missing", "unexpected", "mismatched")
    }
    if isinstance(module, ModelMixin):
        # diffusers believes a sharded checkpoint's index; what the shards really hold is for us to see.
        faults["missing"] |= set(module.state_dict()) - _stored_keys(folder)
    if unused is not None:
        faults["unexpected"] = {key for key in faults["unexpected"] if not unused.match(key)}
    faults["unreadable"] = set(map(str, report.get("error_msgs") or ()))
    for fault, keys in faults.items():
        if keys:
            raise ModelError(
                f"{folder} has {len(keys)} {fault} weights, the first {min(keys)}: "
                "its files are damaged or belong to another model; download them again"
            )
    log.debug("loaded %s from %s", component.__name__, folder)
    return module.eval().requires_grad_(False)
