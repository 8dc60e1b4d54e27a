"""Reads LoRA files: matches the key names of all trainers to the model's weights.

LoRA: Hu et al. 2021, arXiv:2106.09685.

Trainers name the same weights in four ways: by HunyuanVideo's modules or by diffusers', each with dots or, as
kohya's programs do, with underscores. Converters mix dots and underscores. With all dots replaced by
underscores, two ways are left. No torch here: the header is enough to see whether a file fits.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from framepack_core.errors import RequestError
from framepack_core.models import model_files
from framepack_core.models.headers import Header, Tensor, read_header
from framepack_core.models.lora_families import other_family
from framepack_core.models.registry import ModelSpec
from framepack_core.request import Lora

NAMED = 3  # keys in a message

# HunyuanVideo's name, without dots -> diffusers' names, whose rows it stacks
_Names = Mapping[str, tuple[str, ...]]
_DOUBLE: _Names = {
    "img_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "img_attn_proj": ("attn.to_out.0",),
    "img_mlp_fc1": ("ff.net.0.proj",),
    "img_mlp_fc2": ("ff.net.2",),
    "img_mod_linear": ("norm1.linear",),
    "txt_attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "txt_attn_proj": ("attn.to_add_out",),
    "txt_mlp_fc1": ("ff_context.net.0.proj",),
    "txt_mlp_fc2": ("ff_context.net.2",),
    "txt_mod_linear": ("norm1_context.linear",),
}
_SINGLE: _Names = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation_linear": ("norm.linear",),
}
_REFINER: _Names = {
    "self_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "self_attn_proj": ("attn.to_out.0",),
    "mlp_fc1": ("ff.net.0.proj",),
    "mlp_fc2": ("ff.net.2",),
    "adaLN_modulation_1": ("norm_out.linear",),
}
_BLOCKS = (
    (re.compile(r"double_blocks_(\d+)_(\w+)"), "transformer_blocks", _DOUBLE),
    (re.compile(r"single_blocks_(\d+)_(\w+)"), "single_transformer_blocks", _SINGLE),
    (
        re.compile(r"txt_in_individual_token_refiner_blocks_(\d+)_(\w+)"),
        "context_embedder.token_refiner.refiner_blocks",
        _REFINER,
    ),
)
# ComfyUI's names of HunyuanVideo's modules, if they differ.
_COMFYUI = {
    "mlp_0": "mlp_fc1",
    "mlp_2": "mlp_fc2",
    "mod_lin": "mod_linear",
    "modulation_lin": "modulation_linear",
    "time_in_in_layer": "time_in_mlp_0",
    "time_in_out_layer": "time_in_mlp_2",
    "guidance_in_in_layer": "guidance_in_mlp_0",
    "guidance_in_out_layer": "guidance_in_mlp_2",
    "t_embedder_in_layer": "t_embedder_mlp_0",
    "t_embedder_out_layer": "t_embedder_mlp_2",
    "c_embedder_in_layer": "c_embedder_linear_1",
    "c_embedder_out_layer": "c_embedder_linear_2",
}
# Its rows are shift and scale in HunyuanVideo, scale and shift in diffusers.
_SWAPPED = "final_layer_adaLN_modulation_1"
_OTHERS = {
    "img_in_proj": "x_embedder.proj",
    "txt_in_input_embedder": "context_embedder.proj_in",
    "txt_in_t_embedder_mlp_0": "context_embedder.time_text_embed.timestep_embedder.linear_1",
    "txt_in_t_embedder_mlp_2": "context_embedder.time_text_embed.timestep_embedder.linear_2",
    "txt_in_c_embedder_linear_1": "context_embedder.time_text_embed.text_embedder.linear_1",
    "txt_in_c_embedder_linear_2": "context_embedder.time_text_embed.text_embedder.linear_2",
    "time_in_mlp_0": "time_text_embed.timestep_embedder.linear_1",
    "time_in_mlp_2": "time_text_embed.timestep_embedder.linear_2",
    "vector_in_in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in_out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in_mlp_0": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in_mlp_2": "time_text_embed.guidance_embedder.linear_2",
    "final_layer_linear": "proj_out",
    _SWAPPED: "norm_out.linear",
}

# PEFT puts the adapter's name before ".weight".
_KEY = re.compile(r"(.+?)\.(?:lora[._](down|up|A|B)(?:\.\w+)?\.weight|alpha)")
# Prefixes of a module's name, without dots, any number of them; names of modules can begin with them too.
_PREFIXES = re.compile(
    r"(_orig_mod|module|base_model|model|diffusion_model|transformer|unet|dit|lora|lycoris)_"
)
_TEXT_ENCODER = re.compile(r"(lora_)?(te\d?|text_encoders?(_\d)?)[._]")
_OF_A_BLOCK = re.compile(r"blocks?[._]\d+[._]")
# Keys of other methods: using only the plain LoRA keys of such a file would give untrained weights.
_OTHER_METHODS = re.compile(
    r".+\.(dora_scale|lora_magnitude_vector.*|hada_\w+|lokr_\w+|b?oft_\w+|lora_mid.*|lora[._]\w+\.bias|diff|diff_b)"
)
_FLOATS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}
_WHOLE_NUMBERS = {"I8", "I16", "I32", "I64", "U8"}  # in which some converters write alpha
_SIDES = {"down": "down", "A": "down", "up": "up", "B": "up"}


@dataclass(frozen=True)
class Part:
    """What a LoRA adds to one weight: up @ down, scaled by alpha / rank."""

    weight: str  # name of the transformer's weight in the model's files
    down: str  # key of the matrix (rank, columns)
    up: str  # key of the matrix (rows, rank)
    alpha: str | None  # key
    first: int  # first row of ``up`` that belongs to this weight
    rows: int
    swapped: bool = False  # whether the halves of the rows are exchanged


@dataclass(frozen=True)
class Fit:
    """How the keys of a LoRA match the weights of a transformer."""

    parts: tuple[Part, ...]
    matched: int  # keys
    unmatched: tuple[str, ...]
    keys: int  # all keys of the file
    ignored: int  # keys for text encoders, which are not changed
    alpha: float | None  # of parts without an alpha key; None: the rank
    changed: Mapping[str, int]  # weight -> how many numbers it has

    @property
    def counts(self) -> dict[str, int]:
        """The number of matched, unmatched and all keys."""
        return {"matched": self.matched, "unmatched": len(self.unmatched), "keys": self.keys}

    @property
    def text(self) -> str:
        """The match in words."""
        text = f"matched {self.matched} of {self.keys} keys"
        if self.unmatched:
            text += f", {len(self.unmatched)} match no weight ({_some(self.unmatched)})"
        return text + (f", {self.ignored} for text encoders are ignored" if self.ignored else "")


def fit_all(loras: Iterable[Lora], spec: ModelSpec) -> list[Fit]:
    """Match LoRAs to a model, by the headers of their files and the model's.

    Raises:
        RequestError: one cannot be read, or does not fit.
        ModelError: the model's files are missing or damaged.
    """
    headers = [(lora, read_lora(lora.file)) for lora in loras]  # first: a fault of a LoRA needs no model
    base = model_files.read_transformer(spec).tensors if headers else {}
    return [fit(lora.file.name, header, base, allow_partial=lora.allow_partial) for lora, header in headers]


def read_lora(file: Path) -> Header:
    """Read the header of a LoRA file.

    Raises:
        RequestError: it cannot be read, is not a safetensors file, or was made for another family of models.
    """
    if file.suffix.lower() != ".safetensors":
        raise RequestError(f"LoRA {file.name} is no .safetensors file: convert it; no other format is read")
    try:
        header = read_header(file)
    except OSError as error:
        raise RequestError(
            f"LoRA {file} cannot be read ({error.strerror}): put it there, or leave it out of loras"
        ) from error
    except ValueError as error:
        raise RequestError(f"LoRA {file.name} cannot be used ({error}): download or save it again") from error
    if other := other_family(header.metadata):
        raise RequestError(
            f"LoRA {file.name} was made for {other[0]} ({other[1]} in its metadata): use one for "
            "HunyuanVideo or FramePack"
        )
    return header


def fit(name: str, lora: Header, base: Mapping[str, Tensor], *, allow_partial: bool = False) -> Fit:
    """Match a LoRA's keys to the transformer's weights.

    Args:
        name: of the LoRA, for messages.
        lora: the header of its file.
        base: the transformer's tensors, by their names in its files.
        allow_partial: accept it even if keys of blocks match no weight.

    Raises:
        RequestError: no key matches, a key of a block does not, shapes do not fit, or it is not a plain LoRA.
    """
    own = {key.removesuffix(".weight"): tensor for key, tensor in base.items() if len(tensor.shape) > 1}
    flat = {module.replace(".", "_"): module for module in own}
    modules, others, ignored = _sorted_keys(name, lora)
    parts, unmatched, matched = list[Part](), list(others), 0
    for module, keys in modules.items():
        for flattened in _without_prefixes(module.replace(".", "_")):
            weights = (flat[flattened],) if flattened in flat else _renamed(flattened)
            if weights and all(weight in own for weight in weights):
                shapes = {weight: own[weight] for weight in weights}
                parts += _parts(name, keys, shapes, lora, flattened == _SWAPPED)
                matched += len(keys)
                break
        else:
            unmatched += keys.values()
    if not parts:
        raise RequestError(
            f"LoRA {name} does not fit the model: none of its {len(lora.tensors)} keys matches "
            f"({_some(list(lora.tensors)) or 'it has none'}): use one for HunyuanVideo or FramePack, with "
            "the names of musubi-tuner, diffusion-pipe or diffusers"
        )
    of_blocks = [key for key in unmatched if _OF_A_BLOCK.search(key)]
    if of_blocks and not allow_partial:
        raise RequestError(
            f"LoRA {name} fits the model only in part: {matched} of {len(lora.tensors)} keys matched, and "
            f"some keys of blocks did not ({_some(of_blocks)}): use one that was made for this model, or "
            "write allow_partial = true next to its file to apply what fits"
        )
    _verify_once(name, parts)
    changed = {part.weight: base[part.weight].parameters for part in parts}
    alpha = _metadata_alpha(name, lora.metadata)
    return Fit(tuple(parts), matched, tuple(unmatched), len(lora.tensors), ignored, alpha, changed)


def _sorted_keys(name: str, lora: Header) -> tuple[dict[str, dict[str, str]], list[str], int]:
    """Group the keys by module and side; also give the other keys, and the count for text encoders."""
    modules = dict[str, dict[str, str]]()  # the file's name of the module -> side -> key
    others, ignored = list[str](), 0
    for key in lora.tensors:
        read = _KEY.fullmatch(key)
        if _TEXT_ENCODER.match(key):
            ignored += 1
        elif read:
            keys, side = modules.setdefault(read[1], {}), _SIDES.get(read[2], "alpha")
            if side in keys:
                raise RequestError(
                    f"LoRA {name} holds {keys[side]} and {key} for the same weight: use one that holds a "
                    "single LoRA"
                )
            keys[side] = key
        else:
            others.append(key)
    for key in others:
        # Other tensors of the same module change the meaning of the matrices, such as a scale of fp8 numbers.
        above = (key[: dot.start()] for dot in re.finditer(r"\.", key))
        if _OTHER_METHODS.fullmatch(key) or any(module in modules for module in above):
            raise RequestError(
                f"LoRA {name} is not a plain LoRA ({key}): DoRA, LoHa, LoKr, differences and scaled fp8 are "
                "not supported: use one with only lora_up and lora_down, or lora_A and lora_B"
            )
    return modules, others, ignored


def _without_prefixes(module: str) -> Iterator[str]:
    """Give a name without dots, then without its first prefix, its second ...: a prefix may be part of it."""
    yield module
    while prefix := _PREFIXES.match(module):
        module = module[prefix.end() :]
        yield module


def _verify_once(name: str, parts: Iterable[Part]) -> None:
    """Refuse a file that changes one weight under two names: it would count twice."""
    seen = dict[str, Part]()
    for part in parts:
        if (first := seen.setdefault(part.weight, part)) is not part:
            raise RequestError(
                f"LoRA {name} changes {part.weight} twice ({first.up} and {part.up}): use one that holds a "
                "single LoRA"
            )


def _renamed(module: str) -> tuple[str, ...]:
    """Give diffusers' names of a HunyuanVideo module; () if there is no such module."""
    comfyui = (module.removesuffix(end) + own for end, own in _COMFYUI.items() if module.endswith(end))
    for name in (module, *comfyui):
        if name in _OTHERS:
            return (_OTHERS[name],)
        for pattern, blocks, names in _BLOCKS:
            if (found := pattern.fullmatch(name)) and found[2] in names:
                return tuple(f"{blocks}.{found[1]}.{part}" for part in names[found[2]])
    return ()


def _parts(
    name: str, keys: Mapping[str, str], weights: Mapping[str, Tensor], lora: Header, swapped: bool
) -> Iterator[Part]:
    """Split a module of HunyuanVideo by its rows into the weights that it has in diffusers."""
    for side, other in (("up", "down"), ("down", "up")):
        if side not in keys:
            key = keys.get(other) or keys["alpha"]
            raise RequestError(f"LoRA {name} is not whole: {key} has no lora_{side}: get it again")
    up, down = lora.tensors[keys["up"]].shape, lora.tensors[keys["down"]].shape
    rows = [weight.shape[0] for weight in weights.values()]
    columns = next(iter(weights.values())).parameters // rows[0]
    rank = down[0] if down else 0
    for side, key in keys.items():
        kind = lora.tensors[key].dtype
        if kind not in _FLOATS and not (side == "alpha" and kind in _WHOLE_NUMBERS):
            raise RequestError(
                f"LoRA {name}: {key} holds numbers of type {kind}: use one that is not quantized"
            )
    fits = rank > 0 and _matrix(up) == (sum(rows), rank) and _matrix(down) == (rank, columns)
    if not fits or ("alpha" in keys and lora.tensors[keys["alpha"]].parameters != 1):
        first, shape = next((module, weight.shape) for module, weight in weights.items())
        wanted = f"{first} {shape}" if len(rows) == 1 else f"{' + '.join(weights)} {(sum(rows), columns)}"
        raise RequestError(
            f"LoRA {name} does not fit the model: {keys['up']} {up} times {keys['down']} {down} cannot "
            f"change {wanted}: use one that was made for this model"
        )
    first_row = 0
    for weight, count in zip(weights, rows, strict=True):
        yield Part(f"{weight}.weight", keys["down"], keys["up"], keys.get("alpha"), first_row, count, swapped)
        first_row += count


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """Flatten the shape of a convolution to that of a matrix."""
    rows, *others = shape or (0,)
    return rows, math.prod(others)


def _metadata_alpha(name: str, metadata: Mapping[str, str]) -> float | None:
    """Read the alpha of all parts that diffusers writes into the metadata; None without one."""
    try:
        entries = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        values = {key.removeprefix("transformer."): value for key, value in entries.items()}
        alpha = values.get("lora_alpha")
        alpha = None if alpha is None else float(alpha)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise RequestError(f"LoRA {name} has damaged metadata ({error!r}): get it again") from error
    for key in ("alpha_pattern", "use_rslora", "use_dora"):
        if values.get(key):
            raise RequestError(f"LoRA {name} was made with {key}, which is not supported: use another")
    return alpha


def _some(keys: list[str] | tuple[str, ...]) -> str:
    more = len(keys) - NAMED
    return ", ".join(key[:100] for key in keys[:NAMED]) + (f" and {more} more" if more > 0 else "")


def sha256(file: Path) -> str:
    """Give the hex SHA-256 of a file's content; cached until the file changes.

    Raises:
        OSError: it cannot be read.
    """
    status = file.stat()
    return _sha256(file, status.st_size, status.st_mtime_ns, status.st_ino)


@lru_cache(maxsize=64)
def _sha256(file: Path, *_: int) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
