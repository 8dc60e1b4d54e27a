"""Lists the weights of TAEHV, a tiny decoder for HunyuanVideo, and checks a file for them.

TAEHV: Ollin Boer Bohan, 2025, https://github.com/madebyollin/taehv. No torch here.
"""

import zipfile
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

from framepack_core.errors import ModelError
from framepack_core.models.headers import read_header

PREFIX = "decoder."
CHANNELS = 16  # of latents
WIDTHS = (256, 128, 64, 64)  # channels of the three stages, and of the last one's output
BLOCKS = 3  # per stage
STAGE_LAYERS = 6  # numbered layers per stage: the blocks, upsampling, growth in time, a convolution
FIRST_LAYER, LAST_LAYER = 1, 22
_GROWTH = (1, 2, 2)  # frames that a stage makes of one
_REMEDY = "use taehv.safetensors or taehv.pth from https://github.com/madebyollin/taehv"

Shape = tuple[int, ...]


def stage_layer(stage: int) -> int:
    """Give the number of the first layer of a stage."""
    return FIRST_LAYER + 2 + STAGE_LAYERS * stage


def shapes() -> dict[str, Shape]:
    """Give the shape of every weight, by its name without ``PREFIX``."""
    found = _convolution(f"{FIRST_LAYER}", WIDTHS[0], CHANNELS)
    for stage, (width, following) in enumerate(pairwise(WIDTHS)):
        layer = stage_layer(stage)
        for block in range(layer, layer + BLOCKS):
            found |= _convolution(f"{block}.conv.0", width, 2 * width)  # reads a frame and the one before
            found |= _convolution(f"{block}.conv.2", width, width)
            found |= _convolution(f"{block}.conv.4", width, width)
        found[f"{layer + BLOCKS + 1}.conv.weight"] = (_GROWTH[stage] * width, width, 1, 1)
        found[f"{layer + BLOCKS + 2}.weight"] = (following, width, 3, 3)
    return found | _convolution(f"{LAST_LAYER}", 3, WIDTHS[-1])


def _convolution(name: str, width: int, channels: int) -> dict[str, Shape]:
    return {f"{name}.weight": (width, channels, 3, 3), f"{name}.bias": (width,)}


def check_file(file: Path) -> None:
    """Check that a file holds the weights; of a .pth file only that it is an archive, until it is loaded.

    Raises:
        ModelError: the file is missing, damaged, or holds something else.
    """
    if file.suffix.lower() not in (".safetensors", ".pth"):
        raise ModelError(f"{file} is neither .safetensors nor .pth: {_REMEDY}")
    try:
        with file.open("rb") as stream:
            archive = zipfile.is_zipfile(stream)
        tensors = read_header(file).tensors if file.suffix.lower() == ".safetensors" else {}
    except OSError as error:
        raise ModelError(
            f"{file} cannot be read ({error.strerror}): {_REMEDY}, or correct the path"
        ) from error
    except ValueError as error:
        raise ModelError(f"{file} is damaged ({error}): {_REMEDY}") from error
    if file.suffix.lower() == ".safetensors":
        check_shapes(file, {name: tensor.shape for name, tensor in tensors.items()})
    elif not archive:
        raise ModelError(f"{file} is damaged (no archive of torch's, or cut off): {_REMEDY}")


def check_shapes(file: Path, found: Mapping[str, Shape]) -> None:
    """Check that ``found`` has all weights, in their shapes.

    Raises:
        ModelError: one is missing or has another shape; the text names ``file``.
    """
    for name, shape in shapes().items():
        key = PREFIX + name
        if found.get(key) != shape:
            what = f"{key} has the shape {found[key]}, not {shape}" if key in found else f"it has no {key}"
            raise ModelError(f"{file} is not the tiny decoder for HunyuanVideo ({what}): {_REMEDY}")
