"""Where components live: on the device while they are used, in host memory otherwise."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from diffusers.hooks import apply_group_offloading
from torch import nn

from framepack_core.errors import ModelError
from framepack_core.footprint import CONTEXT
from framepack_core.planning import Card

if TYPE_CHECKING:
    from diffusers import AutoencoderKLHunyuanVideo

# Free device memory from which the reference keeps everything on the device; and what decoding takes
# beside the weights (14.4 GiB for a section at 640 x 608 without tiles).
RESIDENT_BYTES, DECODE_BYTES = 60 * 2**30, 16 * 2**30
TILE, SMALL_TILE = 256, 128  # the VAE's own, and the least that shows no seams at a glance


@dataclass(frozen=True)
class Rung:
    """A step of the ladder that is gone down when the device has too little memory, at the price of time."""

    tile: int | None  # side of the VAE's tiles in pixels; None: frames are decoded whole
    resident: bool  # all components stay on the device
    streamed: bool = False  # weights visit the device layer by layer

    @property
    def text(self) -> str:
        """Say it to a person."""
        parts = [f"decoding in tiles of {self.tile} pixels" if self.tile else "decoding whole frames"]
        if not self.resident:
            parts.append("components moved off the device between phases")
        if self.streamed:
            parts.append("weights streamed layer by layer")
        return ", ".join(parts)


def ladder(top: Rung) -> tuple[Rung, ...]:
    """List what to try one after the other; only the smaller tiles change pixels, slightly."""
    tiled = replace(top, tile=TILE)
    moved = replace(tiled, resident=False)
    streamed = replace(moved, streamed=True)
    rungs = (top, tiled, moved, streamed, replace(streamed, tile=SMALL_TILE))
    return tuple(dict.fromkeys(rungs))  # without those that save nothing more


DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def choose_device(name: str) -> torch.device:
    """Turn ``auto``, ``cpu``, ``cuda`` or ``cuda:0`` into a device that is there.

    Raises:
        ModelError: it is not.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ModelError(f"device {name!r} is unknown: use auto, cpu or cuda:0") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ModelError(
            f"device {name!r} is not there ({torch.cuda.device_count()} CUDA devices are): "
            'check the driver with nvidia-smi, or use device = "auto"'
        )
    return device


def device_name(device: torch.device) -> str:
    """Name a device so that it can be told from another model of card."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def choose_dtypes(device: torch.device, name: str) -> tuple[torch.dtype, torch.dtype]:
    """Choose the dtypes of the transformer and of the encoders and the VAE.

    As the reference: bfloat16 and float16 on a GPU. On the CPU float32 throughout, where half precision
    gains nothing.

    Raises:
        ModelError: the name is not a dtype.
    """
    on_gpu = device.type == "cuda"
    if name == "auto":
        name = "bfloat16" if on_gpu else "float32"
    if name not in DTYPES:
        raise ModelError(f"dtype {name!r} is unknown: use auto, {', '.join(DTYPES)}")
    transformer = DTYPES[name]
    return transformer, torch.float16 if on_gpu and transformer != torch.float32 else torch.float32


def free_bytes(device: torch.device) -> int | None:
    """Give the free memory of an accelerator, None for the CPU; what torch holds unused counts as free."""
    if device.type != "cuda":
        return None
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def card(device: torch.device) -> Card | None:
    """Describe the accelerator to plan for; None for the CPU. What this process has on it counts as free."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    ours = torch.cuda.memory_reserved(device) + CONTEXT
    return Card(device_name(device), total, min(total, free + ours))


def keeps_resident(device: torch.device, weight_bytes: int = 0) -> bool:
    """Say whether all components, so many bytes of weights, stay on the device at once."""
    free = free_bytes(device)
    return free is None or free > max(RESIDENT_BYTES, weight_bytes + DECODE_BYTES)


def weight_bytes(*modules: nn.Module) -> int:
    """Add up what the parameters and buffers of modules take."""
    return sum(
        tensor.numel() * tensor.element_size()
        for module in modules
        for tensor in (*module.parameters(), *module.buffers())
    )


def set_tiles(vae: "AutoencoderKLHunyuanVideo", tile: int | None) -> None:
    """Have the VAE work on whole frames, or in tiles of a side, which overlap by a quarter."""
    if tile is None:
        vae.disable_tiling()
    else:
        vae.enable_tiling(
            tile_sample_min_height=tile,
            tile_sample_min_width=tile,
            tile_sample_stride_height=tile * 3 // 4,
            tile_sample_stride_width=tile * 3 // 4,
        )


def stream(*modules: nn.Module, device: torch.device) -> None:
    """Have the weights of modules visit the device layer by layer, from host memory."""
    for module in modules:
        apply_group_offloading(module, onload_device=device, offload_type="leaf_level")


@contextmanager
def visiting(*modules: nn.Module, device: torch.device) -> Iterator[None]:
    """Have modules on the device inside the block, as copies; what is in host memory is never written.

    Weights that are the same tensor stay the same one. What the block changes in them is lost: nothing is
    copied back. A failure half way, for want of memory, leaves every module whole in host memory.
    """
    parts = (part for module in modules for part in module.modules())
    holders: Iterator[dict[str, Any]] = (held for part in parts for held in (part._parameters, part._buffers))
    own = [
        (tensors, name, tensor)
        for tensors in holders
        for name, tensor in tensors.items()
        if tensor is not None
    ]
    copies: dict[torch.Tensor, torch.Tensor] = {}
    try:
        for tensors, name, tensor in own:
            if tensor not in copies:
                copies[tensor] = _copy(tensor, device)
            tensors[name] = copies[tensor]
        yield
    finally:
        for tensors, name, tensor in own:
            tensors[name] = tensor


def _copy(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Give a tensor's copy on the device; itself where that is where it is."""
    if tensor.device == device:
        return tensor
    with (
        torch.inference_mode(mode=False),
        torch.no_grad(),
    ):  # so that every visit has the same kind of tensors
        copy = tensor.to(device)
    return nn.Parameter(copy, requires_grad=False) if isinstance(tensor, nn.Parameter) else copy


def release_unused(device: torch.device) -> None:
    """Give memory that torch holds and does not use back to the device."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
