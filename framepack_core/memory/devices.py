"""Chooses the device and its dtypes, describes it, and moves modules to it for a while."""

import gc
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from framepack_core.errors import DeviceError, ModelError
from framepack_core.memory import before_torch
from framepack_core.memory.footprint import CONTEXT
from framepack_core.memory.planning import Card

if TYPE_CHECKING:
    from diffusers import AutoencoderKLHunyuanVideo

log = logging.getLogger(__name__)

NVIDIA_VERSION = Path("/proc/driver/nvidia/version")
BARE_CONTEXT = 128 << 20  # bytes that CUDA takes at least, before anything is computed

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def choose_device(name: str, *, gpu_expected: bool = False) -> torch.device:
    """Turn ``auto``, ``cpu``, ``cuda`` or ``cuda:0`` into a device that can be used.

    Args:
        name: as in the configuration.
        gpu_expected: ``auto`` must not choose the CPU, which would take days.

    Raises:
        DeviceError: the device is not there, or this torch cannot use it.
        ModelError: the kind of device is unknown.
    """
    if name == "auto":
        if not torch.cuda.is_available() and not gpu_expected:
            return torch.device("cpu")
        name = "cuda"
    try:
        device = torch.device(before_torch.name_here(name))
    except RuntimeError as error:
        raise ModelError(f"device {name!r} is unknown: use auto, cpu or cuda:0") from error
    if device.type == "cuda":
        if not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count():
            there = f"{torch.cuda.device_count()} CUDA devices are; {_explain_no_gpu()}"
            raise DeviceError(
                f"device {name!r} is not there ({there}): check the driver with nvidia-smi, or compute on "
                'the CPU with device = "cpu"'
            )
        _refuse_unsupported(device)
    return device


def _explain_no_gpu() -> str:
    """Describe the driver and CUDA, to find out why a GPU is missing."""
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is built without CUDA: install one that is built with it"
    if driver_version() is None:
        return "no NVIDIA driver is loaded"
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call] # torch's own
    except Exception as error:  # of the driver
        return f"driver {driver_version()}: {str(error).partition(chr(10))[0]}"
    return f"driver {driver_version()}"


def _refuse_unsupported(device: torch.device) -> None:
    """Check that torch was built for the GPU's generation."""
    own = torch.cuda.get_device_capability(device)
    names = map(re.compile(r"(sm|compute)_(\d+)(\d)[af]?").fullmatch, torch.cuda.get_arch_list())
    found = [(named[1], (int(named[2]), int(named[3]))) for named in names if named]
    if not found or any(
        # Machine code (sm) runs on later cards of its generation, intermediate code (compute) on all later.
        least <= own and (kind == "compute" or least[0] == own[0])
        for kind, least in found
    ):
        return
    supported = ", ".join(sorted({f"{major}.{minor}" for _, (major, minor) in found}, key=float))
    raise DeviceError(
        f"{device_name(device)} has compute capability {own[0]}.{own[1]}, and torch {torch.__version__} is "
        f"built for {supported}: install a torch that is built for it"
    )


def driver_version() -> str | None:
    """Read the version of the NVIDIA driver that is loaded; None without one."""
    try:
        text = NVIDIA_VERSION.read_text()
    except OSError:
        return None
    found = re.search(r"\d+\.\d+(\.\d+)?", text)
    return found.group() if found else None


def describe(device: torch.device) -> str:
    """Describe a device, its driver and torch's build, for a person who looks for a fault."""
    if device.type != "cuda":
        return f"{device.type}, torch {torch.__version__}"
    major, minor = torch.cuda.get_device_capability(device)
    return (
        f"{device_name(device)}, compute capability {major}.{minor}, driver {driver_version() or 'unknown'}, "
        f"torch {torch.__version__} for CUDA {torch.version.cuda}"
    )


def device_name(device: torch.device) -> str:
    """Give the card's model name, or ``cpu``."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def card_id(device: torch.device) -> str:
    """Give the card's UUID, so that two of one kind can be told apart; its model name where it has none."""
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None) if device.type == "cuda" else None
    return device_name(device) if uuid is None else f"GPU-{uuid}"


def choose_dtypes(device: torch.device, name: str) -> tuple[torch.dtype, torch.dtype]:
    """Choose the dtype of the transformer, and that of the encoders and the VAE.

    ``auto`` is as the reference, bfloat16 and float16, on a GPU; on the CPU it is float32 for both, because
    half precision gains nothing there.

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


def card(device: torch.device) -> Card | None:
    """Describe the GPU to plan for; None for the CPU. The memory of this process counts as free."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    # Kernels and the libraries' workspaces are loaded when something is computed first.
    context = CONTEXT if torch.cuda.max_memory_allocated(device) else BARE_CONTEXT
    ours = torch.cuda.memory_reserved(device) + context
    return Card(device_name(device), total, min(total, free + ours))


def set_tiles(vae: "AutoencoderKLHunyuanVideo", tile: int | None) -> None:
    """Set the VAE's tiles: side in pixels, overlapping by a quarter; None for whole frames."""
    if tile is None:
        vae.disable_tiling()
    else:
        vae.enable_tiling(
            tile_sample_min_height=tile,
            tile_sample_min_width=tile,
            tile_sample_stride_height=tile * 3 // 4,
            tile_sample_stride_width=tile * 3 // 4,
        )


@contextmanager
def visiting(*modules: nn.Module, device: torch.device) -> Iterator[None]:
    """Replace the weights of modules by copies on the device inside the block.

    The originals stay unchanged in host memory: nothing is copied back, and a failure in between, such as too
    little memory, leaves every module whole. Shared tensors stay shared.
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
                copies[tensor] = copy_to(tensor, device)
            tensors[name] = copies[tensor]
        yield
    finally:
        for tensors, name, tensor in own:
            tensors[name] = tensor


def copy_to(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Give a copy of a tensor on the device, or the tensor itself if it is there."""
    if tensor.device == device:
        return tensor
    quantized: Any = tensor
    scales = getattr(tensor, "quant_state", None)
    # Never inference tensors: torch would compile the blocks again for another kind of tensor.
    with torch.inference_mode(mode=False), torch.no_grad():
        try:
            if scales is not None:  # bitsandbytes moves them in place, but the original weight needs them too
                quantized.quant_state = deepcopy(scales)
            copy = tensor.to(device)
        finally:
            if scales is not None:
                quantized.quant_state = scales
    # The copy of a quantized parameter is a parameter already.
    plain = isinstance(tensor, nn.Parameter) and not isinstance(copy, nn.Parameter)
    return nn.Parameter(copy, requires_grad=False) if plain else copy


def release_unused(device: torch.device) -> None:
    """Release the memory that torch caches: on the device, and page-locked on the host."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        if hasattr(torch.accelerator, "empty_host_cache"):  # missing in the oldest supported torch
            torch.accelerator.empty_host_cache()
