"""Chooses the device and its dtypes, says what is there, and has modules visit it."""

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
BARE_CONTEXT = 128 << 20  # bytes that CUDA takes at least before anything is computed

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def choose_device(name: str, *, gpu_expected: bool = False) -> torch.device:
    """Turn ``auto``, ``cpu``, ``cuda`` or ``cuda:0`` into a device that can be used.

    Args:
        name: as in the configuration.
        gpu_expected: ``auto`` is a GPU and nothing else: the CPU would take days for what is asked.

    Raises:
        DeviceError: it is not there, or this torch cannot use it.
        ModelError: there is no such kind of device.
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
            there = f"{torch.cuda.device_count()} CUDA devices are; {_why_no_gpu()}"
            raise DeviceError(
                f"device {name!r} is not there ({there}): check the driver with nvidia-smi, or compute on "
                'the CPU with device = "cpu"'
            )
        _refuse_unsupported(device)
    return device


def _why_no_gpu() -> str:
    """Say what there is of a driver and of CUDA."""
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is built without CUDA: install one that is built with it"
    if driver_version() is None:
        return "no NVIDIA driver is loaded"
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call] # torch's own
    except Exception as error:  # whatever the driver says
        return f"driver {driver_version()}: {str(error).partition(chr(10))[0]}"
    return f"driver {driver_version()}"


def _refuse_unsupported(device: torch.device) -> None:
    """Check that torch was built for the GPU's generation."""
    own = torch.cuda.get_device_capability(device)
    names = map(re.compile(r"(sm|compute)_(\d+)(\d)[af]?").fullmatch, torch.cuda.get_arch_list())
    found = [(named[1], (int(named[2]), int(named[3]))) for named in names if named]
    if not found or any(
        # Machine code runs on later cards of its generation, the intermediate code on all later ones.
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
        told = NVIDIA_VERSION.read_text()
    except OSError:
        return None
    found = re.search(r"\d+\.\d+(\.\d+)?", told)
    return found.group() if found else None


def describe(device: torch.device) -> str:
    """Name a device, its driver and what torch was built for, as a person looks for them in a fault."""
    if device.type != "cuda":
        return f"{device.type}, torch {torch.__version__}"
    major, minor = torch.cuda.get_device_capability(device)
    return (
        f"{device_name(device)}, compute capability {major}.{minor}, driver {driver_version() or 'unknown'}, "
        f"torch {torch.__version__} for CUDA {torch.version.cuda}"
    )


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


def card(device: torch.device) -> Card | None:
    """Describe the accelerator to plan for; None for the CPU. What this process has on it counts as free."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    # Kernels are loaded, and libraries take their workspaces, when something is computed.
    context = CONTEXT if torch.cuda.max_memory_allocated(device) else BARE_CONTEXT
    ours = torch.cuda.memory_reserved(device) + context
    return Card(device_name(device), total, min(total, free + ours))


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
    quantized: Any = tensor
    scales = getattr(tensor, "quant_state", None)
    with (
        torch.inference_mode(mode=False),
        torch.no_grad(),
    ):  # so that every visit has the same kind of tensors
        try:
            if scales is not None:  # bitsandbytes moves those it finds, which the host's weight goes on using
                quantized.quant_state = deepcopy(scales)
            copy = tensor.to(device)
        finally:
            if scales is not None:
                quantized.quant_state = scales
    plain = isinstance(tensor, nn.Parameter) and not isinstance(copy, nn.Parameter)
    return (
        nn.Parameter(copy, requires_grad=False) if plain else copy
    )  # quantized ones are a kind of their own


def release_unused(device: torch.device) -> None:
    """Give memory that torch holds and does not use back: to the device, and page-locked one to the host."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        if hasattr(torch.accelerator, "empty_host_cache"):  # not in the oldest that will do
            torch.accelerator.empty_host_cache()
