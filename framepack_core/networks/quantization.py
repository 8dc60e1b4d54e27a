"""Stores the blocks' weights in fewer bits: less memory, and other pixels."""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from framepack_core.errors import ModelError
from framepack_core.memory.footprint import Precision
from framepack_core.networks import fp8

if TYPE_CHECKING:
    from framepack_core.networks.transformer import Blocks


def reduce(
    blocks: "Blocks", precision: Precision, dtype: torch.dtype, device: torch.device | None = None
) -> None:
    """Reduce the blocks' weights to a precision; inputs and outputs stay in ``dtype``.

    fp8 takes half the memory of bfloat16, and is multiplied in 8 bits if the ``device`` can. nf4 (Dettmers et
    al. 2023, arXiv:2305.14314) takes a little more than a quarter, and needs bitsandbytes.

    Raises:
        ModelError: bitsandbytes is not installed.
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
                setattr(parent, name, small.eval())  # one at a time: the exact weight is freed


def quantize(weight: torch.Tensor) -> nn.Parameter:
    """Convert a weight to nf4, on its device."""
    import bitsandbytes.nn as bnb

    # bitsandbytes quantizes when a parameter is moved.
    small: nn.Parameter = bnb.Params4bit(weight, requires_grad=False, quant_type="nf4").to(weight.device)
    return small
