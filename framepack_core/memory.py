"""Where components live: on the device while they are used, in host memory otherwise."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from framepack_core.errors import ModelError

RESIDENT_BYTES = 60 * 2**30  # free device memory from which the reference keeps everything on the device


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
    """Give the free memory of an accelerator, None for the CPU."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def keeps_resident(device: torch.device) -> bool:
    """Say whether all components fit on the device at once."""
    free = free_bytes(device)
    return free is None or free > RESIDENT_BYTES


@contextmanager
def on_device(*modules: nn.Module, device: torch.device, resident: bool) -> Iterator[None]:
    """Have modules on the device inside the block; release them after it, unless they stay."""
    for module in modules:
        _move(module, device)
    try:
        yield
    finally:
        if not resident:
            for module in modules:
                _move(module, torch.device("cpu"))
            if device.type == "cuda":
                torch.cuda.empty_cache()


def _move(module: Any, device: torch.device) -> None:
    if next(module.parameters()).device != device:
        module.to(device)
