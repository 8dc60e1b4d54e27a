"""Blocks in fewer bits than they were published in: smaller, and not the same video any more."""

from typing import TYPE_CHECKING, Any, Literal

import torch
from diffusers.hooks import apply_layerwise_casting
from torch import nn

from framepack_core.errors import ModelError

if TYPE_CHECKING:
    from framepack_core.transformer import Blocks

Precision = Literal["exact", "fp8", "nf4"]
FP8 = torch.float8_e4m3fn
_BLOCKS = ("transformer_blocks.", "single_transformer_blocks.")
# The norms' weights are few, and the result depends on them most.
_AS_THEY_ARE = "norm"


def stored_as(name: str, precision: Precision, dtype: torch.dtype) -> torch.dtype:
    """Give the dtype that :func:`reduce` stores a weight of the transformer in: it can be loaded so."""
    reduced = precision == "fp8" and name.startswith(_BLOCKS) and _AS_THEY_ARE not in name
    return FP8 if reduced else dtype


def reduce(blocks: "Blocks", precision: Precision, dtype: torch.dtype) -> None:
    """Store the weights of the blocks in fewer bits; they go on computing in ``dtype``.

    fp8 halves bfloat16 and costs a cast a step; nf4 (Dettmers et al. 2023, arXiv:2305.14314) needs a little
    more than a quarter, with bitsandbytes. LoRAs are to be merged before.

    Raises:
        ModelError: the library that it takes is not installed.
    """
    if precision == "fp8":
        apply_layerwise_casting(blocks, FP8, dtype, skip_modules_pattern=(_AS_THEY_ARE,))
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
