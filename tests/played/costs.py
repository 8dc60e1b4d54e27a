"""The time of operations on a card: arithmetic for matrix products, memory traffic for all others."""

from typing import Any

import torch

from tests.played.cards import CardModel

_MATRICES = {f"aten::{name}" for name in ("mm", "addmm", "bmm", "baddbmm", "matmul")}
_CONVOLUTIONS = {f"aten::{name}" for name in ("convolution", "conv1d", "conv2d", "conv3d")}
_OF_CONVOLUTIONS = 0.45  # of the card's arithmetic


def of(
    card: CardModel, name: str, args: Any, read: list[torch.Tensor], written: list[torch.Tensor]
) -> tuple[float, float]:
    """Give an operation's seconds and its multiplications and additions."""
    moved = sum(tensor.nbytes for tensor in (*read, *written) if tensor.ndim)
    flops, rate = 0.0, card.flops
    if name in _MATRICES:
        left, right = [value for value in args if isinstance(value, torch.Tensor)][-2:]
        flops = 2.0 * left.numel() * right.shape[-1]
    elif name == "aten::linear":
        flops = 2.0 * args[0].numel() * args[1].shape[0]
    elif name in _CONVOLUTIONS:
        flops = 2.0 * written[0].numel() * (args[1].numel() / args[1].shape[0])
        rate *= _OF_CONVOLUTIONS
    return max(flops / rate, moved / card.bandwidth), flops


def attention_kernels(query: torch.Tensor, mask: torch.Tensor | None, *, gqa: bool) -> tuple[str, ...]:
    """Name PyTorch's attention kernels that accept such an input; without one, plain operations are used."""
    half, head = query.dtype in (torch.float16, torch.bfloat16), query.shape[-1]
    takes = {
        "flash": half and mask is None and head <= 256 and not gqa,
        "efficient": half or query.dtype == torch.float32,
        "cudnn": half and head <= 128 and head % 8 == 0,
    }
    return tuple(name for name, can in takes.items() if can)
