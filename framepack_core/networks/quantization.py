"""Stores the blocks in fewer bits than they were published in: smaller, and another video."""

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from framepack_core.errors import ModelError
from framepack_core.networks import fp8

if TYPE_CHECKING:
    from framepack_core.networks.transformer import Blocks

Precision = Literal["exact", "fp8", "nf4"]


def reduce(
    blocks: "Blocks", precision: Precision, dtype: torch.dtype, device: torch.device | None = None
) -> None:
    """Have the blocks' weights be in fewer bits; what enters and leaves them is of ``dtype``.

    fp8 halves bfloat16, and is multiplied as it is if the ``device`` does that; nf4 (Dettmers et al. 2023,
    arXiv:2305.14314) needs a little more than a quarter, with bitsandbytes. LoRAs are to be merged before.

    Raises:
        ModelError: the library that it takes is not installed.
    """
    if precision == "fp8":
        fp8.reduce(blocks)
        for layer in fp8.layers(blocks).values():
            layer.multiplies = device is not None and fp8.multiplies(device, dtype)
    elif precision == "nf4":
        _to_nf4(blocks, dtype)


def _to_nf4(blocks: nn.Module, dtype: torch.dtype) -> None:
    try:
        import bitsandbytes.nn as bnb
    except ImportError as error:
        raise ModelError(
            f'precision = "nf4" needs bitsandbytes, which cannot be imported ({error}): '
            'pip install "framepackd[nf4]", or set another precision'
        ) from error
    for parent in list(blocks.modules()):
        for name, linear in list(parent.named_children()):
            if isinstance(linear, nn.Linear):
                small: Any = bnb.Linear4bit(
                    linear.in_features, linear.out_features, bias=False, compute_dtype=dtype, quant_type="nf4"
                )
                small.weight = quantize(linear.weight.data)
                small.bias = linear.bias
                setattr(parent, name, small.eval())  # one at a time


def quantize(weight: torch.Tensor) -> nn.Parameter:
    """Give a weight in nf4, where it is."""
    import bitsandbytes.nn as bnb

    # It is when it is moved that it is quantized.
    small: nn.Parameter = bnb.Params4bit(weight, requires_grad=False, quant_type="nf4").to(weight.device)
    return small
