"""Checks, by their headers alone, whether a model's files hold the model's weights. No torch here.

Used by ``check``, by ``models verify``, by the daemon before it starts a worker, and for loading.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from framepack_core.errors import ModelError
from framepack_core.models import headers, registry, shapes, weight_files
from framepack_core.models.headers import OtherKindError, Tensor, read_header
from framepack_core.models.registry import ModelSpec
from framepack_core.models.shapes import Shapes

FRAMEPACK_CLASSES = ("HunyuanVideoFramepackTransformer3DModel", "HunyuanVideoTransformer3DModelPacked")
_OF_FRAMEPACK = {"clean_x_embedder.proj.weight", "clean_x_embedder.proj_4x.weight"}
PARTS = {
    "transformer": "FramePack's transformer, in diffusers' names (transformer_blocks.0.attn.to_q.weight ...)",
    "text_encoder": "the text encoder LlamaModel, in transformers' (layers.0.mlp.up_proj.weight ...)",
    "text_encoder_2": "the text encoder CLIPTextModel, in transformers' (encoder.layers.0.mlp ...)",
    "image_encoder": "the image encoder SiglipVisionModel, in transformers' (post_layernorm.weight ...)",
    "vae": "the VAE AutoencoderKLHunyuanVideo, in diffusers' names (decoder.up_blocks.0.resnets.0 ...)",
}
# Recognized by one of the keys, with any prefix; the first match counts.
_KNOWN = (
    (r"lora_(A|B|up|down)\b", "a LoRA, which goes into loras"),
    (
        r"double_blocks\.\d+\.img_attn[._]qkv\..*",
        "a transformer with the original names of HunyuanVideo or FLUX, not diffusers'",
    ),
    (r"clean_x_embedder\..*", "FramePack's transformer, or a part of it"),
    (
        r"single_transformer_blocks\.\d+\.attn\.to_q\..*",
        "another transformer of diffusers', such as HunyuanVideo's",
    ),
    (r"blocks\.\d+\.self_attn\.q\..*", "a transformer of Wan"),
    (
        r"(encoder\.down|decoder\.up)\.\d+\.block\.\d+\..*",
        "a VAE with the original names, as ComfyUI has it, not diffusers'",
    ),
    (r"decoder\.(up_blocks|mid_block)\..*", "a VAE of diffusers'"),
    (r"vision_model\.embeddings\.patch_embedding\..*", "an image encoder (SigLIP or CLIP)"),
    (r"(embeddings\.token_embedding|token_embedding)\.weight", "a CLIP text encoder"),
    (r"layers\.\d+\.mlp\.gate_proj\..*", "a language model such as Llama"),
    (r"encoder\.block\.\d+\.layer\..*", "a T5 text encoder"),
)
_TAKE = {
    headers.GGUF: (
        "its packed numbers cannot be read: use the safetensors of the same model, in bf16 or, half as "
        "large, in fp8, such as FramePackI2V_HY_fp8_e4m3fn.safetensors"
    ),
    headers.POINTER: "run git lfs pull where it lies, or download the file itself",
    headers.PAGE: "download the file itself; on the hub its address has /resolve/, that of its page /blob/",
    headers.ANSWER: "most likely an error message of a server: download the file again",
    headers.PICKLE: "and is never read: use the safetensors of the same model",
    headers.EMPTY: "download it again",
}
# Keys of a part that are not used: no warning.
_UNUSED = re.compile(
    r"scaled_fp8|.*\.(scale_input|input_scale|comfy_quant)|embeddings\.position_ids|.*rotary_emb\.inv_freq|head\..*",
    re.DOTALL,
)
_SCALES = ("scale_weight", "weight_scale")  # of fp8 numbers, in ComfyUI's older and newer files


@dataclass(frozen=True)
class Stored:
    """The weights of a part of a model, and the files that hold them."""

    place: Path  # a folder, or a file
    config: Mapping[str, Any]  # the content of its config.json
    tensors: Mapping[str, Tensor]  # by their names in the model
    left_over: tuple[str, ...]  # keys that are not weights of the model

    @property
    def warning(self) -> str | None:
        """A warning about keys that are not used; None if there are none."""
        if not self.left_over:
            return None
        count = len(self.left_over)
        keys = "1 key that is no weight" if count == 1 else f"{count} keys that are no weights"
        return f"{self.place} has {keys} of the model ({_some(self.left_over)}): ignored"


def look(spec: ModelSpec) -> dict[str, Stored]:
    """Find all weights of a model, by part.

    Raises:
        ModelError: a file is missing, or does not hold the part's weights.
    """
    found = {}
    for part, place in places(spec):
        try:
            found[part] = read(place, part)
        except ModelError as error:
            own = {"transformer": spec.transformer, "image_encoder": spec.image_encoder}
            local = own.get(part, spec.base).is_local
            hint = "" if local else f" (framepackd models verify {spec.name} says how)"
            raise ModelError(f"model {spec.name}: {error}{hint}") from error
    return found


def faults(spec: ModelSpec) -> Iterator[str]:
    """Describe the fault of each part of a model that has one.

    Raises:
        ModelError: a file is missing.
    """
    for part, place in places(spec):
        try:
            read(place, part)
        except ModelError as error:
            yield str(error)


def places(spec: ModelSpec) -> Iterator[tuple[str, Path]]:
    """Give the folder or file of each part of a model that has weights.

    Raises:
        ModelError: a file is missing.
    """
    found = registry.find(spec)
    yield "transformer", found.transformer
    for part in ("text_encoder", "text_encoder_2", "vae"):
        yield part, found.base / part
    yield "image_encoder", found.image_encoder / "image_encoder"


def read_transformer(spec: ModelSpec) -> Stored:
    """Find the weights of a model's transformer.

    Raises:
        ModelError: a file is missing, or does not hold its weights.
    """
    return read(registry.find(spec).transformer, "transformer")


def read(place: Path, part: str) -> Stored:
    """Find the weights of a part.

    Args:
        place: the folder with its files; for a transformer also the file of its weights.
        part: transformer, text_encoder, text_encoder_2, image_encoder or vae.

    Raises:
        ModelError: a file is missing or damaged, or does not hold the part's weights.
    """
    files = weight_files.choose(place, part)
    if files.missing:
        raise ModelError(f"{files.missing[0]} is missing: put it there, or correct the path in the config")
    config = _config(place, part)
    held = dict[str, Tensor]()
    for file in files.here:
        for key, tensor in _tensors(file).items():
            if key in held:
                raise ModelError(
                    f"{held[key].file} and {file} both hold {key}: leave the files of one model there"
                )
            held[key] = tensor
    try:
        wanted = shapes.expected(part, config)
    except (ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError) as error:
        raise ModelError(f"{place / 'config.json'} makes no sense ({error!r}): download it again") from error
    named = f"{files.here[0]}" if len(files.here) == 1 else f"{place}"
    return _fit(place, named, part, config, held, wanted)


def _tensors(file: Path) -> dict[str, Tensor]:
    try:
        return read_header(file).tensors
    except OtherKindError as error:
        raise ModelError(f"{file} is {error.kind}: {_TAKE[error.kind]}") from error
    except OSError as error:
        raise ModelError(
            f"{file} cannot be read ({error.strerror}): check its rights and its disk"
        ) from error
    except ValueError as error:
        raise ModelError(f"{file} is damaged ({error}): download it again") from error


def _config(place: Path, part: str) -> Mapping[str, Any]:
    """Read a part's config.json; for a file of weights the one in its folder, if it is FramePack's."""
    alone = place.is_file()
    file = (place.parent if alone else place) / "config.json"
    try:
        config = json.loads(file.read_text())
        name = config.get("_class_name")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        if alone:
            return shapes.TRANSFORMER_CONFIG
        raise ModelError(f"{file} is damaged ({error}): download it again") from error
    if alone and name not in FRAMEPACK_CLASSES:
        return shapes.TRANSFORMER_CONFIG
    if part == "transformer" and not (config.get("has_clean_x_embedder") and config.get("has_image_proj")):
        raise ModelError(
            f"{file.parent} holds a transformer that is not FramePack's ({name} in its config.json): "
            "use a FramePack one"
        )
    return dict(config)


def _fit(
    place: Path, named: str, part: str, config: Mapping[str, Any], held: Mapping[str, Tensor], wanted: Shapes
) -> Stored:
    """Find the weights of a part among the keys of its files; messages call these ``named``."""
    prefix = _prefix(held, wanted)
    own = {key.removeprefix(prefix): tensor for key, tensor in held.items() if key.startswith(prefix)}
    missing = [name for name in wanted if name not in own]
    if 2 * len(missing) > len(wanted):
        raise ModelError(
            f"{named} holds {_describe(held)}; wanted is {PARTS[part]}: correct the path in the config, or "
            "use the files that framepackd models download fetches"
        )
    if part == "transformer" and {*missing} >= _OF_FRAMEPACK:
        raise ModelError(
            f"{named} holds a transformer that is not FramePack's (no clean_x_embedder): use a FramePack one"
        )
    if missing:
        raise ModelError(
            f"{named} has {len(missing)} missing weights of {len(wanted)}, the first {min(missing)}: its "
            "files are incomplete or belong to another model; download them again"
        )
    tensors = {name: _scaled(name, own) for name in wanted}
    used = {tensor.key for tensor in tensors.values()}
    used |= {tensor.scale.key for tensor in tensors.values() if tensor.scale is not None}
    left_over = [key for key in held if key not in used and not _UNUSED.fullmatch(key.removeprefix(prefix))]
    _verify_shapes(named, tensors, wanted)
    _verify_numbers(named, tensors)
    _verify_left_over(named, [key.removeprefix(prefix) for key in left_over], wanted)
    return Stored(place, config, tensors, tuple(left_over))


def _prefix(held: Mapping[str, Tensor], wanted: Shapes) -> str:
    """Find the prefix that the names of all weights have, such as ``model.diffusion_model.``."""
    anchor = min(wanted, key=lambda name: (re.search(r"\d", name) is not None, name))
    prefixes = {key.removesuffix(anchor) for key in held if key == anchor or key.endswith(f".{anchor}")}
    return max(prefixes, key=lambda prefix: sum(prefix + name in held for name in wanted), default="")


def _scaled(name: str, own: Mapping[str, Tensor]) -> Tensor:
    """Give a weight's tensor, with the scale that belongs to it."""
    module, _, kind = name.rpartition(".")
    found = (own[key] for scale in _SCALES if (key := f"{module}.{scale}") in own)
    return own[name]._replace(scale=next(found, None)) if kind == "weight" else own[name]


def _verify_shapes(named: str, tensors: Mapping[str, Tensor], wanted: Shapes) -> None:
    others = [name for name, tensor in tensors.items() if tensor.shape != wanted[name]]
    if others:
        name = min(others)
        raise ModelError(
            f"{named} has {len(others)} mismatched weights: {tensors[name].key} has the shape "
            f"{_shape(tensors[name].shape)} where the model has {_shape(wanted[name])}: use the files of "
            "one model"
        )


def _verify_numbers(named: str, tensors: Mapping[str, Tensor]) -> None:
    """Check that the types of numbers are supported, and that scaled numbers have their scales."""
    scaled = any(tensor.scale for tensor in tensors.values())
    for tensor in tensors.values():
        if tensor.dtype not in headers.FLOAT_BYTES:
            raise ModelError(
                f"{named} holds numbers of type {tensor.dtype} ({tensor.key}), which is not supported: use "
                "the same model as bf16, fp16, fp32 or fp8"
            )
        rows = tensor.shape[:1]
        scale, narrow = tensor.scale, tensor.dtype.startswith("F8")
        if scaled and narrow and len(tensor.shape) > 1 and scale is None:
            raise ModelError(
                f"{named} holds {tensor.key} without the scale that others have: download it again"
            )
        if scale is not None and (
            not narrow
            or scale.dtype not in ("F32", "F16", "BF16")
            or scale.shape not in ((), (1,), (1, 1), rows, (*rows, 1))
        ):
            raise ModelError(
                f"{named} scales {tensor.key} ({tensor.dtype}) by {scale.key} ({scale.dtype}, "
                f"{_shape(scale.shape)}), which is not supported: use one scaled by layer, or bf16"
            )


def _verify_left_over(named: str, left_over: list[str], wanted: Shapes) -> None:
    """Refuse keys that change the meaning of the weights: of the same module as a weight, or extra layers."""
    modules = {name.rpartition(".")[0] for name in wanted}
    kinds = {_unnumbered(name) for name in wanted}
    for key in left_over:
        above = (key[: dot.start()] for dot in re.finditer(r"\.", key))
        if _unnumbered(key) in kinds or any(module in modules for module in above):
            raise ModelError(
                f"{named} has {len(left_over)} unexpected weights, such as {key}: its files belong to "
                "another model than its config.json, or are packed in an unsupported way"
            )


def _unnumbered(name: str) -> str:
    return re.sub(r"\d+", "N", name)


def _describe(held: Mapping[str, Tensor]) -> str:
    """Describe what files hold that do not hold the wanted weights."""
    for pattern, what in _KNOWN:
        for key in held:
            if re.search(rf"(^|\.)({pattern})", key):
                return f"{what} ({key})"
    return f"something else ({_some(tuple(held))})" if held else "no weights"


def _some(keys: tuple[str, ...]) -> str:
    return ", ".join(keys[:3]) + (" ..." if len(keys) > 3 else "")


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "()"
