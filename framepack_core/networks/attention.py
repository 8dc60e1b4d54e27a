"""Chooses the library that computes attention, half of a step's time at resolution 640."""

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend

from framepack_core.errors import ModelError

# PyTorch chooses among its own backends by the device: on Hopper cuDNN's, from torch 2.11 on.
AUTO = "native"
ON_THE_CPU = ("native", "_native_math", "_native_flash", "flex")
FIRST_RIGHT_CUDNN = 91501  # before 9.15.1 it is wrong for lengths that 128 does not divide, such as ours


def choose_attention(name: str, device: torch.device) -> str:
    """Give diffusers' name of the attention backend to use.

    Raises:
        ModelError: the name is unknown, or the backend does not work here.
    """
    chosen = AUTO if name == "auto" else name
    known = [backend.value for backend in AttentionBackendName]
    if chosen not in known:
        raise ModelError(f"attention must be auto or one of {', '.join(known)}, got {name!r}")
    if device.type == "cpu" and chosen not in ON_THE_CPU:
        raise ModelError(
            f'attention = "{name}" needs a GPU: set it to "auto", or one of {", ".join(ON_THE_CPU)}'
        )
    cudnn = torch.backends.cudnn.version() or 0  # type: ignore[no-untyped-call] # torch does not type it
    if chosen == "_native_cudnn" and cudnn < FIRST_RIGHT_CUDNN:
        raise ModelError(
            f'attention = "{name}" needs cuDNN 9.15.1, and here is {cudnn}: '
            'set attention = "auto", or install a newer torch'
        )
    try:
        with attention_backend(AttentionBackendName(chosen)):
            return chosen
    except Exception as error:  # of the backend's library, or of the hub that it is fetched from
        raise ModelError(
            f'attention = "{name}" cannot be used ({type(error).__name__}: {error}): '
            'install what is missing, or set attention = "auto"'
        ) from error
