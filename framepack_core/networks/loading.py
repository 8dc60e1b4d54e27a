"""Loads a model's components from this machine; refuses files that lack weights."""

import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights  # type: ignore[import-untyped]  # it has no types
from diffusers import AutoencoderKLHunyuanVideo, HunyuanVideoFramepackTransformer3DModel
from safetensors import SafetensorError
from torch import nn
from transformers import (
    CLIPTextModel,
    CLIPTokenizer,
    LlamaModel,
    PreTrainedTokenizerFast,
    SiglipImageProcessorPil,
    SiglipVisionModel,
)
from transformers.utils import logging as transformers_logging

from framepack_core.errors import ModelError
from framepack_core.memory.footprint import Precision
from framepack_core.models import model_files, registry
from framepack_core.models.model_files import Stored
from framepack_core.models.registry import ModelSpec
from framepack_core.models.tensor_files import TensorFiles
from framepack_core.networks import fp8
from framepack_core.networks.encoders import verify_prompt_template

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
    dtype: torch.dtype  # of the transformer's blocks and inputs


def load(
    spec: ModelSpec,
    *,
    dtype: torch.dtype,
    encoder_dtype: torch.dtype,
    precision: Precision = "exact",
) -> Models:
    """Load every component of a model from this machine.

    Args:
        spec: the model; its files are in local folders or in the hub's cache.
        dtype: of the transformer except its last layer, which is float32; in the reference bfloat16.
        encoder_dtype: of text encoders, image encoder and VAE; in the reference float16.
        precision: that the blocks will be reduced to; with fp8, each weight is reduced when it is read, so
            that memory never holds the blocks in a wider dtype.

    Raises:
        ModelError: a file is missing or wrong.
    """
    looked = model_files.look(spec)
    for found in looked.values():
        if found.warning:
            log.warning("model %s: %s", spec.name, found.warning)
    folders = registry.find(spec)
    base = folders.base
    # Not LlamaTokenizerFast: since transformers 5 it drops the spaces of every prompt.
    tokenizer = _read(PreTrainedTokenizerFast, base / "tokenizer")
    verify_prompt_template(tokenizer)
    transformer = _load_diffusers(
        HunyuanVideoFramepackTransformer3DModel, looked["transformer"], dtype, precision
    )
    keep_output_in_float32(transformer)
    return Models(
        spec=spec,
        transformer=transformer,
        text_encoder=_load_transformers(LlamaModel, looked["text_encoder"], encoder_dtype),
        text_encoder_2=_load_transformers(CLIPTextModel, looked["text_encoder_2"], encoder_dtype),
        tokenizer=tokenizer,
        tokenizer_2=_read(CLIPTokenizer, base / "tokenizer_2"),
        vae=_load_diffusers(AutoencoderKLHunyuanVideo, looked["vae"], encoder_dtype),
        # Without the pooling head, which is not used: it reads the weights of a layer without calling it, so
        # that no hook could fetch them.
        image_encoder=_load_transformers(
            SiglipVisionModel, looked["image_encoder"], encoder_dtype, vision_use_head=False
        ),
        # The PIL class by name: with torchvision installed the general class computes other pixels.
        image_processor=_read(SiglipImageProcessorPil, folders.image_encoder / "feature_extractor"),
        dtype=dtype,
    )


def keep_output_in_float32(transformer: Any) -> None:
    """Compute the last layer in float32, so that the velocity is not rounded to the blocks' dtype."""
    transformer.proj_out.to(torch.float32)
    transformer.proj_out.register_forward_pre_hook(_inputs_to_float32)


def _inputs_to_float32(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(tensor.float() for tensor in inputs)


def _read(component: Any, folder: Path, **arguments: Any) -> Any:
    with _explained(folder):
        return component.from_pretrained(folder, local_files_only=True, **arguments)


@contextmanager
def _explained(place: Path) -> Iterator[None]:
    """Turn errors of the libraries into a ModelError that names the files."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        raise ModelError(
            f"{place} cannot be loaded ({type(error).__name__}: {error}): "
            "its files are damaged or incomplete; download them again"
        ) from error


@contextmanager
def _without_bar() -> Iterator[None]:
    """Have transformers draw no progress bar: it is given the weights, and only puts them in their places."""
    wanted = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if wanted:
            transformers_logging.enable_progress_bar()


def _load_diffusers(component: Any, found: Stored, dtype: torch.dtype, precision: Precision = "exact") -> Any:
    """Build a component of diffusers' from the weights that ``look`` has found.

    ``from_pretrained`` knows only its own file names, no scaled numbers, and trusts an index that does not
    match the shards. ``from_single_file`` does not know the class.
    """
    with _explained(found.place):
        with init_empty_weights():
            module = component.from_config({k: v for k, v in found.config.items() if not k.startswith("_")})
        if precision == "fp8":
            fp8.reduce(module)
        module.load_state_dict(_weights(found, dtype, fp8.layers(module)), assign=True)
    return _loaded(module, found)


def _load_transformers(component: Any, found: Stored, dtype: torch.dtype, **changed: Any) -> Any:
    """Build a component of transformers' from the weights that ``look`` has found.

    ``changed`` overrides entries of its config.
    """
    with _explained(found.place), _without_bar():
        config = component.config_class.from_pretrained(found.place, local_files_only=True)
        for name, value in changed.items():  # up to transformers 5.20, from_pretrained ignores them
            setattr(config, name, value)
        module = component.from_pretrained(
            None, config=config, state_dict=_weights(found, dtype), dtype=dtype
        )
    return _loaded(module, found)


def _weights(found: Stored, dtype: torch.dtype, in_fp8: Collection[str] = ()) -> dict[str, torch.Tensor]:
    """Read weights: those stored in ``dtype`` are mapped, others converted one by one.

    The weights of layers ``in_fp8`` are reduced at once, and come with their scales.
    """
    weights = dict[str, torch.Tensor]()
    with TensorFiles() as files:
        for name, tensor in found.tensors.items():
            layer, _, kind = name.rpartition(".")
            if kind == "weight" and layer in in_fp8:
                weights[name], weights[f"{layer}.scale"] = fp8.read(files, tensor, dtype)
            else:
                weights[name] = files.weight(tensor).to(dtype)
    return weights


def _loaded(module: Any, found: Stored) -> Any:
    """Check that the files gave a component all of its weights, and prepare it for inference."""
    own = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items() if not tensor.is_meta}
    for layer in fp8.layers(module):
        del own[f"{layer}.scale"]  # computed when the file has none
    if own != {name: tensor.shape for name, tensor in found.tensors.items()}:
        raise ModelError(
            f"{found.place} does not give {type(module).__name__} all of its weights: report this"
        )
    log.debug("loaded %s from %s", type(module).__name__, found.place)
    return module.eval().requires_grad_(False)
