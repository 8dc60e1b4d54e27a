"""Computes linear layers in 8 bits: e4m3 numbers with a scale for each row.

Cards of compute capability 8.9 and more multiply them as they are, with what enters in 8 bits as well. Others
multiply with what the weights stand for, and so does whatever computes in another dtype than bfloat16.
"""

import functools
import logging
import math

import torch
from torch import nn
from torch.nn.functional import ScalingType, scaled_mm

from framepack_core.memory.device_errors import Verdict, judge
from framepack_core.models.headers import Tensor
from framepack_core.models.tensor_files import TensorFiles

log = logging.getLogger(__name__)

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max
SMALLEST_SCALE = torch.finfo(torch.float32).tiny
CAPABILITY = (8, 9)  # that multiplies it; in widths that 16 divides
MULTIPLE = 16
PIECE = 1 << 25  # numbers that are made into e4m3 at once, by way of float32: 128 MiB

_BLOCKS = ("transformer_blocks.", "single_transformer_blocks.")
# The norms' weights are few, and the result depends on them most.
_AS_THEY_ARE = "norm"


def quantize(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Give a matrix (rows, columns) as e4m3 numbers and float32 scales (rows, 1); their product is near it.

    What is no number stays none.
    """
    if matrix.numel() <= PIECE or torch.compiler.is_compiling():  # which makes one kernel of it
        largest = torch.linalg.vector_norm(matrix, math.inf, dim=1, keepdim=True)
        scale = (largest.float() / LARGEST).clamp(min=SMALLEST_SCALE)
        return (matrix / scale).to(FP8), scale  # float32 between
    numbers = torch.empty_like(matrix, dtype=FP8)
    scale = matrix.new_empty(len(matrix), 1, dtype=torch.float32)
    rows = max(1, PIECE // matrix.shape[1])
    for first in range(0, len(matrix), rows):
        piece = slice(first, first + rows)
        numbers[piece], scale[piece] = quantize(matrix[piece])
    return numbers, scale


def multiplies(device: torch.device, dtype: torch.dtype) -> bool:
    """Say whether a device multiplies e4m3 numbers for what computes in ``dtype``."""
    if device.type != "cuda" or dtype != torch.bfloat16 or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= CAPABILITY and _tried(device)


def manner(device: torch.device, dtype: torch.dtype) -> str:
    """Say what is in 8 bits, and how, on a device."""
    return f"{'weights and activations' if multiplies(device, dtype) else 'weights'}, scaled by row"


@functools.cache
def _tried(device: torch.device) -> bool:
    """Try it: not every torch has the kernel for every later card."""
    weight = torch.eye(MULTIPLE, dtype=torch.bfloat16, device=device)
    try:
        right = torch.equal(_multiply(weight, *quantize(weight), None), weight)
    except Exception as error:  # what PyTorch raises for that changes
        if judge(error) is not Verdict.NOTHING:
            raise
        right = False
    if not right:
        log.warning("this torch cannot multiply in 8 bits on %s: fp8 saves memory only", device)
    return right


class Fp8Linear(nn.Module):
    """A linear layer with its weight in 8 bits."""

    def __init__(self, linear: nn.Linear) -> None:
        """Take another's place, and its bias as it is."""
        super().__init__()
        weight = linear.weight.detach()
        if weight.is_meta:
            numbers, scale = torch.empty_like(weight, dtype=FP8), weight.new_empty(len(weight), 1).float()
        else:
            numbers, scale = quantize(weight)
        self.weight = nn.Parameter(numbers, requires_grad=False)  # (rows, columns)
        self.scale = nn.Parameter(scale, requires_grad=False)  # (rows, 1), float32
        self.bias = linear.bias
        self.multiplies = False  # as they are; see above

    @classmethod
    def fits(cls, name: str, layer: nn.Module) -> bool:
        """Say whether a layer of the blocks, by its name in the transformer, is one to take the place of."""
        return (
            isinstance(layer, nn.Linear)
            and name.startswith(_BLOCKS)
            and _AS_THEY_ARE not in name
            and layer.in_features % MULTIPLE == layer.out_features % MULTIPLE == 0
        )

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Give what a linear layer (..., columns) -> (..., rows) gives, in the dtype of what enters."""
        if not self.multiplies:
            weight = self.weight.to(inputs.dtype).mul_(self.scale)  # in float32, rounded once
            return nn.functional.linear(inputs, weight, self.bias)
        result = _multiply(inputs.flatten(0, -2), self.weight, self.scale, self.bias)
        return result.view(*inputs.shape[:-1], len(self.weight))


def _multiply(
    inputs: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Give inputs (rows, columns) @ weight (rows', columns) transposed, in bfloat16."""
    numbers, own_scale = quantize(inputs)
    return scaled_mm(
        numbers,
        weight.t(),
        own_scale,
        ScalingType.RowWise,
        scale.t(),
        ScalingType.RowWise,
        bias=bias,
        output_dtype=torch.bfloat16,
        use_fast_accum=True,  # its loss is far below that of 8 bits; without, Hopper is slower
    )


def layers(module: nn.Module) -> dict[str, Fp8Linear]:
    """Give the layers that are in 8 bits, by name."""
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, Fp8Linear)}


def reduce(module: nn.Module) -> None:
    """Have the layers of a transformer's blocks be in 8 bits, those that are not yet."""
    for name, layer in list(module.named_modules()):
        if Fp8Linear.fits(name, layer):
            above, _, own = name.rpartition(".")
            setattr(module.get_submodule(above), own, Fp8Linear(layer))  # one at a time


def read(files: TensorFiles, stored: Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Read a weight as :func:`quantize` gives it, of its values in ``dtype``.

    What is stored as e4m3 stays what it is to the bit, with the scale that its file has for it, else 1.

    Raises:
        ModelError: its file cannot be read.
    """
    if stored.dtype != "F8_E4M3":
        return quantize(files.weight(stored).to(dtype))
    numbers = files.read(stored.file, stored.key)
    scale = torch.ones(1) if stored.scale is None else files.read(stored.scale.file, stored.scale.key).float()
    return numbers, scale.reshape(-1, 1).repeat(len(numbers) // scale.numel(), 1)
