"""Computes linear layers in 8 bits: e4m3 numbers with a scale for each row.

Cards from compute capability 8.9 on multiply in 8 bits, with the inputs in 8 bits too. Other cards, and
dtypes other than bfloat16, multiply with the weights converted back.
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
CAPABILITY = (8, 9)  # the first that multiplies e4m3 ...
MULTIPLE = 16  # ... in widths that this divides
PIECE = 1 << 25  # numbers that are converted at once, through float32: 128 MiB

_BLOCKS = ("transformer_blocks.", "single_transformer_blocks.")
# Stay in their dtype: the norms' weights are few, and the result depends on them most.
_NOT_REDUCED = "norm"


def quantize(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Approximate a matrix (rows, columns) by e4m3 numbers times float32 scales (rows, 1).

    NaN stays NaN.
    """
    if matrix.numel() <= PIECE or torch.compiler.is_compiling():  # compiled, it is one kernel
        largest = torch.linalg.vector_norm(matrix, math.inf, dim=1, keepdim=True)
        scale = (largest.float() / LARGEST).clamp(min=SMALLEST_SCALE)
        return (matrix / scale).to(FP8), scale  # the quotient is float32
    numbers = torch.empty_like(matrix, dtype=FP8)
    scale = matrix.new_empty(len(matrix), 1, dtype=torch.float32)
    rows = max(1, PIECE // matrix.shape[1])
    for first in range(0, len(matrix), rows):
        piece = slice(first, first + rows)
        numbers[piece], scale[piece] = quantize(matrix[piece])
    return numbers, scale


def multiplies(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether a device multiplies e4m3 numbers for layers that compute in ``dtype``."""
    if device.type != "cuda" or dtype != torch.bfloat16 or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= CAPABILITY and has_kernel(device)


def manner(device: torch.device, dtype: torch.dtype) -> str:
    """Describe what is in 8 bits on a device, for the records of results."""
    return f"{'weights and activations' if multiplies(device, dtype) else 'weights'}, scaled by row"


@functools.cache
def has_kernel(device: torch.device) -> bool:
    """Multiply in 8 bits once, and return whether it works: some torch builds lack the kernel for a card."""
    weight = torch.eye(MULTIPLE, dtype=torch.bfloat16, device=device)
    try:
        right = torch.equal(_multiply(weight, *quantize(weight), None), weight)
    except Exception as error:  # the type of PyTorch's error differs between versions
        if judge(error) is not Verdict.NOTHING:
            raise
        right = False
    if not right:
        log.warning("this torch cannot multiply in 8 bits on %s: fp8 saves memory only", device)
    return right


class Fp8Linear(nn.Module):
    """A linear layer with its weight in 8 bits."""

    def __init__(self, linear: nn.Linear) -> None:
        """Quantize the weight of another linear layer; the bias is shared."""
        super().__init__()
        weight = linear.weight.detach()
        if weight.is_meta:
            numbers, scale = torch.empty_like(weight, dtype=FP8), weight.new_empty(len(weight), 1).float()
        else:
            numbers, scale = quantize(weight)
        self.weight = nn.Parameter(numbers, requires_grad=False)  # (rows, columns)
        self.scale = nn.Parameter(scale, requires_grad=False)  # (rows, 1), float32
        self.bias = linear.bias
        self.multiplies = False  # in 8 bits; see multiplies()

    @classmethod
    def fits(cls, name: str, layer: nn.Module) -> bool:
        """Return whether a layer, by its name in the transformer, can be replaced."""
        return (
            isinstance(layer, nn.Linear)
            and name.startswith(_BLOCKS)
            and _NOT_REDUCED not in name
            and layer.in_features % MULTIPLE == layer.out_features % MULTIPLE == 0
        )

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Compute the linear layer, (..., columns) -> (..., rows), in the dtype of the inputs."""
        if not self.multiplies:
            weight = self.weight.to(inputs.dtype).mul_(self.scale)  # computed in float32, rounded once
            return nn.functional.linear(inputs, weight, self.bias)
        result = _multiply(inputs.flatten(0, -2), self.weight, self.scale, self.bias)
        return result.view(*inputs.shape[:-1], len(self.weight))


def _multiply(
    inputs: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Compute inputs (rows, columns) @ weight (rows', columns) transposed, in bfloat16."""
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
        use_fast_accum=True,  # loses far less than 8 bits do; without it Hopper is slower
    )


def layers(module: nn.Module) -> dict[str, Fp8Linear]:
    """Give the layers that are in 8 bits, by name."""
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, Fp8Linear)}


def reduce(module: nn.Module) -> None:
    """Replace the linear layers of a transformer's blocks that are not in 8 bits yet."""
    for name, layer in list(module.named_modules()):
        if Fp8Linear.fits(name, layer):
            above, _, own = name.rpartition(".")
            setattr(module.get_submodule(above), own, Fp8Linear(layer))  # one at a time


def read(files: TensorFiles, stored: Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Read a weight, convert it to ``dtype`` and :func:`quantize` it.

    A weight that is stored as e4m3 keeps its bits, with the scale from its file, or 1.

    Raises:
        ModelError: its file cannot be read.
    """
    if stored.dtype != "F8_E4M3":
        return quantize(files.weight(stored).to(dtype))
    numbers = files.read(stored.file, stored.key)
    scale = torch.ones(1) if stored.scale is None else files.read(stored.scale.file, stored.scale.key).float()
    return numbers, scale.reshape(-1, 1).repeat(len(numbers) // scale.numel(), 1)
