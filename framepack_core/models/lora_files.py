"""Reads LoRA files (Hu et al. 2021, arXiv:2106.09685) and matches their keys to the model's weights.

Trainers name the same weights in four ways: by HunyuanVideo's modules or by diffusers', each with dots or, as
kohya's programs do, with underscores. Converters mix dots and underscores. Without dots there are two ways
left. No torch here: that a file fits can be seen from its header, before anything is loaded.
"""

import hashlib
import json
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

_Names = Mapping[str, tuple[str, ...]]  # HunyuanVideo's, without dots -> diffusers', whose rows it stacks
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
# ComfyUI's names of HunyuanVideo's modules, where they differ.
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

_KEY = re.compile(r"(.+?)\.(?:lora[._](down|up|A|B)(?:\.\w+)?\.weight|alpha)")  # PEFT names adapters
# In front of a module's name, without dots, any number of them. Names of modules begin like that, too.
_PREFIXES = re.compile(
    r"(_orig_mod|module|base_model|model|diffusion_model|transformer|unet|dit|lora|lycoris)_"
)
_TEXT_ENCODER = re.compile(r"(lora_)?(te\d?|text_encoders?(_\d)?)[._]")
_OF_A_BLOCK = re.compile(r"blocks?[._]\d+[._]")
# Other ways to change weights: part of such a file without the rest would be something nobody has trained.
_OTHER_METHODS = re.compile(
    r".+\.(dora_scale|lora_magnitude_vector.*|hada_\w+|lokr_\w+|b?oft_\w+|lora_mid.*|lora[._]\w+\.bias|diff|diff_b)"
)
_FLOATS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}
_WHOLE_NUMBERS = {"I8", "I16", "I32", "I64", "U8"}  # which converters write alpha in
_SIDES = {"down": "down", "A": "down", "up": "up", "B": "up"}


@dataclass(frozen=True)
class Part:
    """What a LoRA adds to one weight: up @ down, scaled by alpha / rank."""

    weight: str  # of the transformer, by its name in the files
    down: str  # key, (rank, columns)
    up: str  # key, (rows, rank)
    alpha: str | None  # key
    first: int  # of the rows of ``up`` that belong to this weight
    rows: int
    swapped: bool = False  # halves of the rows are exchanged


@dataclass(frozen=True)
class Fit:
    """Where the keys of a LoRA belong in a transformer."""

    parts: tuple[Part, ...]
    matched: int  # keys
    unmatched: tuple[str, ...]
    keys: int  # all that the file has
    ignored: int  # keys for text encoders, which stay as they are
    alpha: float | None  # of what has no key for it; None: the rank
    changed: Mapping[str, int]  # weight -> its size, in numbers

    @property
    def counts(self) -> dict[str, int]:
        """Count the keys that have found their place, those that have not, and all."""
        return {"matched": self.matched, "unmatched": len(self.unmatched), "keys": self.keys}

    @property
    def text(self) -> str:
        """Say in words how many keys have found their place."""
        told = f"matched {self.matched} of {self.keys} keys"
        if self.unmatched:
            told += f", {len(self.unmatched)} belong nowhere ({_some(self.unmatched)})"
        return told + (f", {self.ignored} for text encoders are ignored" if self.ignored else "")


def fit_all(loras: Iterable[Lora], spec: ModelSpec) -> list[Fit]:
    """Find what LoRAs change in a model, from the headers of their files and the model's.

    Raises:
        RequestError: one cannot be read, or does not fit.
        ModelError: the model's files are missing or damaged.
    """
    headers = [(lora, read_lora(lora.file)) for lora in loras]  # first: what is wrong alone needs no model
    base = model_files.read_transformer(spec).tensors if headers else {}
    return [fit(lora.file.name, header, base, allow_partial=lora.allow_partial) for lora, header in headers]


def read_lora(file: Path) -> Header:
    """Read what a LoRA file holds.

    Raises:
        RequestError: it cannot be read, is no safetensors file, or was made for another family of models.
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
    """Find the weights that a LoRA's keys belong to.

    Args:
        name: of the LoRA, for messages.
        lora: what its file holds.
        base: the transformer's tensors, as its files have them.
        allow_partial: take it even if keys of blocks belong nowhere.

    Raises:
        RequestError: no key belongs anywhere, or not all that are of blocks do, shapes do not fit, or it is
            another thing than a LoRA.
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
            f"LoRA {name} does not fit the model: none of its {len(lora.tensors)} keys does "
            f"({_some(list(lora.tensors)) or 'it has none'}): use one for HunyuanVideo or FramePack, with "
            "the names of musubi-tuner, diffusion-pipe or diffusers"
        )
    of_blocks = [key for key in unmatched if _OF_A_BLOCK.search(key)]
    if of_blocks and not allow_partial:
        raise RequestError(
            f"LoRA {name} fits the model only in part: it matched {matched} of {len(lora.tensors)} keys, and "
            f"of the keys of blocks some belong nowhere ({_some(of_blocks)}): use one that was made for this "
            "model, or write allow_partial = true beside its file to apply what fits"
        )
    _verify_once(name, parts)
    changed = {part.weight: base[part.weight].parameters for part in parts}
    alpha = _told_alpha(name, lora.metadata)
    return Fit(tuple(parts), matched, tuple(unmatched), len(lora.tensors), ignored, alpha, changed)


def _sorted_keys(name: str, lora: Header) -> tuple[dict[str, dict[str, str]], list[str], int]:
    """Give the keys by module and side, the keys that are of no LoRA, and how many are for text encoders."""
    modules = dict[str, dict[str, str]]()  # as the file names it -> side -> key
    others, ignored = list[str](), 0
    for key in lora.tensors:
        read = _KEY.fullmatch(key)
        if _TEXT_ENCODER.match(key):
            ignored += 1
        elif read:
            keys, side = modules.setdefault(read[1], {}), _SIDES.get(read[2], "alpha")
            if side in keys:
                raise RequestError(
                    f"LoRA {name} holds {keys[side]} and {key}, which are the same: use one that holds a "
                    "single LoRA"
                )
            keys[side] = key
        else:
            others.append(key)
    for key in others:
        # Whatever stands beside the two matrices changes what they mean: a scale of fp8 numbers, say.
        above = (key[: dot.start()] for dot in re.finditer(r"\.", key))
        if _OTHER_METHODS.fullmatch(key) or any(module in modules for module in above):
            raise RequestError(
                f"LoRA {name} is not a plain LoRA ({key}): DoRA, LoHa, LoKr, differences and scaled fp8 are "
                "not supported, use one with lora_up and lora_down, or lora_A and lora_B, and nothing beside"
            )
    return modules, others, ignored


def _without_prefixes(module: str) -> Iterator[str]:
    """Give a name without dots, then without one prefix, without two ...: "transformer" may be part of it."""
    yield module
    while prefix := _PREFIXES.match(module):
        module = module[prefix.end() :]
        yield module


def _verify_once(name: str, parts: Iterable[Part]) -> None:
    """Refuse a file that holds the same weight's LoRA under two names: it would count twice."""
    seen = dict[str, Part]()
    for part in parts:
        if (first := seen.setdefault(part.weight, part)) is not part:
            raise RequestError(
                f"LoRA {name} changes {part.weight} twice ({first.up} and {part.up}): use one that holds a "
                "single LoRA"
            )


def _renamed(module: str) -> tuple[str, ...]:
    """Give diffusers' names of one of HunyuanVideo's modules; none if it has no such module."""
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
    """Divide what belongs to several weights that are one in HunyuanVideo: below each other in its rows."""
    for side, other in (("up", "down"), ("down", "up")):
        if side not in keys:
            key = keys.get(other) or keys["alpha"]
            raise RequestError(f"LoRA {name} is not whole: {key} has no lora_{side} beside it: get it again")
    up, down = lora.tensors[keys["up"]].shape, lora.tensors[keys["down"]].shape
    rows = [weight.shape[0] for weight in weights.values()]
    columns = next(iter(weights.values())).parameters // rows[0]
    rank = down[0] if down else 0
    for side, key in keys.items():
        kind = lora.tensors[key].dtype
        if kind not in _FLOATS and not (side == "alpha" and kind in _WHOLE_NUMBERS):
            raise RequestError(
                f"LoRA {name}: {key} holds numbers of kind {kind}: use one that is not quantized"
            )
    fits = rank > 0 and _matrix(up) == (sum(rows), rank) and _matrix(down) == (rank, columns)
    if not fits or ("alpha" in keys and lora.tensors[keys["alpha"]].parameters != 1):
        first, shape = next((module, weight.shape) for module, weight in weights.items())
        wanted = f"{first} {shape}" if len(rows) == 1 else f"{' + '.join(weights)} {(sum(rows), columns)}"
        raise RequestError(
            f"LoRA {name} does not fit the model: {keys['up']} {up} times {keys['down']} {down} is to change "
            f"{wanted}: use one that was made for this model"
        )
    first_row = 0
    for weight, count in zip(weights, rows, strict=True):
        yield Part(f"{weight}.weight", keys["down"], keys["up"], keys.get("alpha"), first_row, count, swapped)
        first_row += count


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """Give a shape as that of a matrix: convolutions are flattened."""
    rows, *others = shape or (0,)
    columns = 1
    for size in others:
        columns *= size
    return rows, columns


def _told_alpha(name: str, metadata: Mapping[str, str]) -> float | None:
    """Read the alpha that diffusers writes beside the tensors, of all of them."""
    try:
        told = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        values = {key.removeprefix("transformer."): value for key, value in told.items()}
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
    """Give the hex SHA-256 of a file's content, computed once for as long as the file stands still.

    Raises:
        OSError: it cannot be read.
    """
    status = file.stat()
    return _sha256(file, status.st_size, status.st_mtime_ns, status.st_ino)


@lru_cache(maxsize=64)
def _sha256(file: Path, *_: int) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
